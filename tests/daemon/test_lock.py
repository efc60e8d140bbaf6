"""The lock of an endpoint: where its files lie, one daemon holds it, and no other daemon's socket is touched."""

from __future__ import annotations

import socket as sockets
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from specd.daemon.lock import owned
from specd.errors import ConfigError, DaemonError
from specd.paths import runtime_dir


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime directory of its own, and private."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def listen(stack: ExitStack, path: Path) -> sockets.socket:
    socket = stack.enter_context(sockets.socket(sockets.AF_UNIX))
    socket.bind(str(path))
    socket.listen()
    return socket


def test_an_endpoint_elsewhere_needs_no_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nowhere")
    tmp_path.chmod(0o700)
    with owned(f"ipc://{tmp_path}/d.sock") as prefix:
        assert prefix == tmp_path / "d.sock"
    with pytest.raises(ConfigError, match="set XDG_RUNTIME_DIR"), owned("tcp://127.0.0.1:7070"):
        pass


def test_one_daemon_an_endpoint(directory: Path, stack: ExitStack) -> None:
    endpoints = [
        f"ipc://{directory}/d.sock", "tcp://127.0.0.1:7201", "tcp://127.0.0.2:7201", "tcp://[::1]:7201",
        "tcp://127.0.0.1:*",
    ]  # fmt: skip
    prefixes = [stack.enter_context(owned(endpoint)) for endpoint in endpoints]
    assert len(set(prefixes)) == len(endpoints)
    for endpoint in endpoints[:-1]:
        with pytest.raises(DaemonError, match="already owns"), owned(endpoint):
            pass
    stack.close()
    assert [path.name for path in directory.iterdir()] == [runtime_dir().name]
    assert list(runtime_dir().iterdir()) == []
    for endpoint in endpoints:
        with owned(endpoint):
            pass


def test_stale_sockets_are_removed_and_those_of_other_endpoints_are_not(directory: Path, stack: ExitStack) -> None:
    listen(stack, directory / "qwen").close()
    for stale in ("qwen.0123abcd.in", "qwen.0123abcd.out"):
        listen(stack, directory / stale)
    others = [stack.enter_context(owned(f"ipc://{directory}/qwen.{name}")) for name in ("fp8", "ab12cd34.in")]
    for other in others:
        listen(stack, other)
    (directory / "qwen.0123abce.in").write_text("no socket")
    with owned(f"ipc://{directory}/qwen"):
        left = {path.name for path in directory.iterdir() if path.is_socket()}
        assert left == {path.name for path in others}
    assert all(path.is_socket() for path in others)


def test_a_live_daemon_is_not_taken_over_when_its_lock_was_removed(directory: Path, stack: ExitStack) -> None:
    endpoint = f"ipc://{directory}/d.sock"
    with owned(endpoint) as prefix:
        listen(stack, prefix)
        Path(f"{prefix}.lock").unlink()
        with pytest.raises(DaemonError, match="already owns"), owned(endpoint):
            pass
        assert prefix.is_socket()


def test_the_end_of_a_daemon_that_lost_its_lock_leaves_the_next_one_alone(directory: Path, stack: ExitStack) -> None:
    endpoint = f"ipc://{directory}/d.sock"
    first = ExitStack()
    prefix = first.enter_context(owned(endpoint))
    Path(f"{prefix}.lock").unlink()
    with owned(endpoint):
        listen(stack, prefix)
        first.close()
        assert prefix.is_socket()
        assert Path(f"{prefix}.lock").exists()
