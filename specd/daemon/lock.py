"""The lock that allows one daemon per endpoint, and the removal of stale sockets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket as sockets
from collections.abc import Iterator
from pathlib import Path

from specd.errors import ConfigError, DaemonError
from specd.paths import check_private, make_runtime_dir, runtime_dir

MAX_PREFIX = 107 - len(".01234567.out")
"""Longest path prefix in bytes: with the suffix of a worker's pipe it is a socket path, at most 107 bytes."""
_PIPE = r"\.[0-9a-f]{8}\.(in|out)"
"""What the names of a worker's pipes add to the prefix."""


@contextlib.contextmanager
def owned(endpoint: str) -> Iterator[Path]:
    """Hold the lock of an endpoint; yields the path prefix of the daemon's own sockets.

    libzmq silently takes over a live ipc endpoint, so a lock file beside it decides.
    """
    prefix = _prefix(endpoint)
    if (length := len(os.fsencode(prefix))) > MAX_PREFIX:
        raise ConfigError(
            f"endpoint {endpoint}: its path {prefix} has {length} bytes, at most {MAX_PREFIX} leave room for the "
            f"daemon's own sockets beside it; choose a shorter one, or a shorter XDG_RUNTIME_DIR"
        )
    check_private(prefix.parent)
    path = Path(f"{prefix}.lock")
    lock = _lock(path)
    if lock is None or _answers(prefix):  # it answers without a lock when somebody removed the file
        if lock is not None:
            os.close(lock)
        raise DaemonError(
            f"a daemon already owns {endpoint}: use it, stop it with `specd stop --endpoint {endpoint}`, or start this "
            f"one on another --endpoint"
        )
    try:
        _clear_sockets(prefix)
        yield prefix
    finally:
        if _is_at(lock, path):  # else what is there now belongs to another daemon
            _clear_sockets(prefix)
            path.unlink()
        os.close(lock)


def _prefix(endpoint: str) -> Path:
    """Beside an ipc endpoint, or in the runtime directory under a name that says which endpoint it is."""
    if not endpoint.startswith("ipc://"):
        name = re.sub(r"[^\w.-]", "_", endpoint.replace("://", "-"))
        own = f"-{os.getpid()}" if endpoint.endswith(":*") else ""  # any number of daemons can take a free port
        return make_runtime_dir() / f"{name}{own}"
    prefix = Path(endpoint.removeprefix("ipc://"))
    if prefix.parent == runtime_dir():
        make_runtime_dir()
    elif not prefix.parent.is_dir():
        raise ConfigError(f"endpoint {endpoint}: its directory does not exist; create it with mode 700")
    return prefix


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock, None if another process holds it."""
    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if _is_at(lock, path):
            return lock
        os.close(lock)  # its owner ended meanwhile and removed the file


def _is_at(lock: int, path: Path) -> bool:
    """Whether this path still is the file that is locked."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(lock), path.lstat())
    return False


def _answers(path: Path) -> bool:
    """Whether somebody listens at a socket."""
    with contextlib.suppress(OSError), sockets.socket(sockets.AF_UNIX) as probe:
        probe.connect(str(path))
        return True
    return False


def _clear_sockets(prefix: Path) -> None:
    """Remove the sockets of a dead daemon: its endpoint, and the pipes of its workers, but no other endpoint's."""
    pipe = re.compile(re.escape(prefix.name) + _PIPE)
    for path in (prefix, *(path for path in prefix.parent.iterdir() if pipe.fullmatch(path.name))):
        if path.is_socket() and (path == prefix or not Path(f"{path}.lock").exists()):
            path.unlink(missing_ok=True)
