"""One daemon an endpoint: the lock that it holds, and the sockets it may leave behind."""

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
"""Bytes of a path that still give socket paths, 107 bytes at most, when the workers' pipes are named after it."""


@contextlib.contextmanager
def owned(endpoint: str) -> Iterator[Path]:
    """Own an endpoint; yields the path prefix of the daemon's own sockets.

    libzmq takes over a live ipc endpoint without a word, so a lock file beside it decides.
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
    """Remove the sockets of a daemon that is gone: its endpoint, its workers' pipes."""
    for path in (prefix, *prefix.parent.glob(f"{glob.escape(prefix.name)}.*")):
        if path.is_socket():
            path.unlink(missing_ok=True)
