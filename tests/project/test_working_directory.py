"""No process of specd runs the Python files of the directory that it is started in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import specd as specd_package
from daemons import synthetic
from specd.transports.testing.spawned import SAFE_PATH, no_working_directory

ROOT = Path(__file__).parents[2]
MODULES = ("msgspec.py", "queue.py", "types.py", "socket.py", "pickle.py", "torch/__init__.py", "zmq/__init__.py")
CHILDREN = """
import sys
from pathlib import Path
from specd.cli.demo import Stage
from specd.train.interrupt import Interrupt
from specd.transports.testing.spawned import SpawnedHost
if __name__ == "__main__":
    host = SpawnedHost("shm", 2, 64)
    host.fill(0, 1, b"nonce", 64)
    host.close()
    with Interrupt() as interrupt, Stage(interrupt) as stage:
        stage.serve(Path(sys.argv[1]), *sys.argv[2:])
        stage.run("status", "--endpoint", sys.argv[-1])
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory of modules that leave their names in the file `ran` beside it, and fail."""
    for module in MODULES:
        path = tmp_path / "place" / module
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({module!r}); raise SystemExit('it was run')")
    return tmp_path / "place"


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "d").mkdir(mode=0o700)
    name = f"ipc://{tmp_path}/d/d.sock"
    yield name
    specd(tmp_path, "stop", "--endpoint", name, "--timeout", "0.5", "--force")


def specd(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What the console script does, which does not have its working directory on the path."""
    return python(where, "-P", "-m", "specd", *arguments)


def python(where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != SAFE_PATH}  # whoever runs the tests may have it
    return subprocess.run([sys.executable, *arguments], cwd=where, env=env, capture_output=True, text=True, timeout=60)


def ran(place: Path) -> str:
    path = place.with_name("ran")
    return path.read_text() if path.exists() else ""


def test_these_modules_are_run_where_nothing_prevents_it(place: Path) -> None:
    assert python(place, "-m", "specd", "--version").returncode == 1
    assert ran(place)


def test_a_detached_daemon_and_its_worker(place: Path, endpoint: str) -> None:
    done = specd(place, *synthetic(endpoint))
    assert done.returncode == 0, done.stderr
    assert specd(place, "stop", "--endpoint", endpoint).returncode == 0
    assert not ran(place)


def test_the_commands_of_the_demo_and_the_hosts_of_the_transports(place: Path, endpoint: str, tmp_path: Path) -> None:
    (tmp_path / "children.py").write_text(CHILDREN)
    arguments = [argument for argument in synthetic(endpoint) if argument not in ("--detach", "--endpoint", endpoint)]
    done = python(place, "-P", str(tmp_path / "children.py"), str(tmp_path / "log"), *arguments, "--endpoint", endpoint)
    assert done.returncode == 0, (done.stderr, (tmp_path / "log").read_text())
    assert "serving" in done.stdout
    assert not ran(place)


def test_overlapping_blocks_leave_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SAFE_PATH, raising=False)
    inside, go = threading.Event(), threading.Event()

    def block(wait: Callable[[], object]) -> None:
        with no_working_directory():
            inside.set()
            wait()

    first = threading.Thread(target=block, args=(lambda: go.wait(10),))
    second = threading.Thread(target=block, args=(lambda: first.join(10),))
    first.start()
    inside.wait(10)
    second.start()
    second.join(0.2)  # inside, if blocks may overlap: then it ends after the first
    go.set()
    first.join(10)
    second.join(10)
    assert SAFE_PATH not in os.environ


def test_every_module_that_specd_starts_is_started_so() -> None:
    for folder in ("specd", "cli", "bench", "transports"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            assert not re.search(r"""sys\.executable,\s*["']-(?!P)""", text), path
            started = text.count(".get_context(")
            assert text.count("with no_working_directory():") == started, path


def test_a_tree_that_is_not_installed_is_found_by_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m specd` at its root, as `make demo PYTHON=python3` does."""
    from specd.__main__ import remember_source

    source = str(Path(specd_package.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setattr(sys, "path", ["/elsewhere", source])
    remember_source()
    assert os.environ["PYTHONPATH"] == "before"
    monkeypatch.setattr(sys, "path", [source])
    remember_source()
    assert os.environ["PYTHONPATH"] == f"{source}{os.pathsep}before"
