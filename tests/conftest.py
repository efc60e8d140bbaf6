"""What holds for every test: its own runtime directory, one thread a process, no GPU where there is none, no leaks."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import specd

MARK = "SPECD_TEST_SESSION"
SHM = Path("/dev/shm")

# Read by torch when it is first imported, here and in every child.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Children do not look in the working directory, where pytest found the specd of a tree that is not installed.
if (source := Path(specd.__file__).parents[1]) == Path(__file__).parents[1]:
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))


def pytest_sessionstart() -> None:
    """End at once where SPECD_VERSIONS (`make newest`) names other versions than there are."""
    wanted = dict(one.split("==") for one in os.environ.get("SPECD_VERSIONS", "").split())
    found = {name: metadata.version(name) for name in wanted}
    if other := sorted(
        f"{name} {found[name]}, not {version}" for name, version in wanted.items() if found[name] != version
    ):
        pytest.exit(f"the environment has {', '.join(other)}", returncode=1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs more CUDA devices than there are; fail it when SPECD_REQUIRE_GPU=1."""
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return
    import torch

    wanted = int(marker.args[0]) if marker.args else 1
    if (found := torch.cuda.device_count()) < wanted:
        reason = f"needs {wanted} CUDA device(s), found {found}"
        if os.environ.get("SPECD_REQUIRE_GPU") == "1":
            pytest.fail(f"{reason}, and SPECD_REQUIRE_GPU=1 forbids to skip", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def clean_machine() -> Iterator[None]:
    """Give the session a runtime directory of its own, and fail it when a process, segment or socket outlives it."""
    os.environ[MARK] = uuid.uuid4().hex
    # Short, because an ipc path has at most 107 bytes.
    runtime = Path(tempfile.mkdtemp(prefix="sd-", dir="/tmp"))
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    before = _segments()
    yield
    leaks = [f"process {process}" for process in _processes(os.environ[MARK])]
    leaks += [f"segment {path}" for path in sorted(_segments() - before) if _is_orphan(path)]
    leaks += [f"socket {path}" for path in runtime.rglob("*") if path.is_socket()]
    shutil.rmtree(runtime, ignore_errors=True)
    assert not leaks, "the tests left behind: " + "; ".join(leaks)


def _segments() -> set[Path]:
    return set(SHM.glob("specd-*"))


def _is_orphan(path: Path) -> bool:
    """Whether no living process holds the segment's lock: its creator died. Another session's daemon holds its own."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as segment:
        try:
            fcntl.flock(segment, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
    return False


def _processes(mark: str) -> Iterator[str]:
    """Processes that inherited this session's mark, but for the session itself and Python's own helper."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes() and "resource_tracker" not in command:
                yield f"{entry.name} ({command})"


@pytest.fixture(autouse=True)
def plain_logging() -> Iterator[None]:
    """Undo the handler and the level that a command line sets, whatever fixture ran it."""
    yield
    logger = logging.getLogger("specd")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    os.environ.pop("SPECD_LOG", None)


@pytest.fixture(scope="session")
def no_compile_workers_left(clean_machine: None) -> Iterator[None]:
    """torch's compile workers outlive the tests; these end before the session."""
    yield
    import torch._inductor.async_compile

    torch._inductor.async_compile.shutdown_compile_workers()


@pytest.fixture
def few_compile_workers(no_compile_workers_left: None) -> Iterator[None]:
    """Compile in this process, but with several workers where kernels are compiled for a GPU."""
    import torch._inductor.config

    with torch._inductor.config.patch(compile_threads=8 if torch.cuda.is_available() else 1):
        yield


@pytest.fixture
def ipv6() -> None:
    """Skips where the machine has no IPv6."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"needs IPv6: {error}")
