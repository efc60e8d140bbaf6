"""The lock that allows one daemon per endpoint, and the removal of stale sockets."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
from collections.abc import Iterator
from pathlib import Path

from specd.errors import ConfigError, DaemonError
from specd.paths import check_private, make_runtime_dir, runtime_dir

MAX_PREFIX = 107 - len(".01234567.out")
"""Longest path prefix in bytes: with the suffix of a worker's pipe it is a socket path, at most 107 bytes."""


@contextlib.contextmanager
def owned(endpoint: str) -> Iterator[Path]:
    """Hold the lock of an endpoint; yields the path prefix of the daemon's own sockets.

    libzmq silently takes over a live ipc endpoint, so a lock file beside it decides.
    """
    if endpoint.startswith("ipc://"):
        prefix = Path(endpoint.removeprefix("ipc://"))
        if prefix.parent == runtime_dir():
            make_runtime_dir()
        elif not prefix.parent.is_dir():
            raise ConfigError(f"endpoint {endpoint}: its directory does not exist; create it with mode 700")
    else:
        prefix = make_runtime_dir() / endpoint.rpartition(":")[2]
    if (length := len(os.fsencode(prefix))) > MAX_PREFIX:
        raise ConfigError(
            f"endpoint {endpoint}: its path {prefix} has {length} bytes, at most {MAX_PREFIX} leave room for the "
            f"daemon's own sockets beside it; choose a shorter one, or a shorter XDG_RUNTIME_DIR"
        )
    check_private(prefix.parent)
    lock = os.open(f"{prefix}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise DaemonError(
            f"a daemon already owns {endpoint}: use it, stop it with `specd stop --endpoint {endpoint}`, or start this "
            f"one on another --endpoint"
        ) from None
    try:
        _clear_sockets(prefix)
        yield prefix
    finally:
        _clear_sockets(prefix)
        os.close(lock)


def _clear_sockets(prefix: Path) -> None:
    """Remove the sockets of a dead daemon: its endpoint, its workers' pipes."""
    for path in (prefix, *prefix.parent.glob(f"{glob.escape(prefix.name)}.*")):
        if path.is_socket():
            path.unlink(missing_ok=True)
