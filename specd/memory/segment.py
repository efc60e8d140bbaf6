"""Segments: the named files in shared memory that host arenas are made of."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from typing import Final

from specd.errors import TransportError

SHM_DIR: Final = "/dev/shm"
_EPOCH: Final = re.compile(r"[0-9a-f]{8,64}")


class NoRoomError(TransportError):
    """Shared memory has no room for an arena."""


def segment_path(epoch: str) -> str:
    """Where the segment of an epoch (hex) lies. Raises TransportError for anything that is not hex."""
    if not _EPOCH.fullmatch(epoch) or len(epoch) % 2:
        raise TransportError(f"epoch {epoch!r}: expected 8 to 64 lower-case hex digits, in pairs")
    return f"{SHM_DIR}/{prefix()}{epoch}"


def is_segment_path(path: str) -> bool:
    """Whether a path is exactly the name of a segment of this user."""
    start = f"{SHM_DIR}/{prefix()}"
    return path.startswith(start) and _EPOCH.fullmatch(path[len(start) :]) is not None


def remove(segment: str) -> bool:
    """Unlink a segment of this user, by path or by epoch, also that of another process: for a worker that was killed.

    Mappings stay valid. Returns whether it was there.
    """
    path = segment if is_segment_path(segment) else segment_path(segment)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def sweep() -> list[str]:
    """Unlink the segments of this user whose creator is dead, that is, the unlocked ones. Returns their paths."""
    removed: list[str] = []
    try:
        names = [name for name in os.listdir(SHM_DIR) if is_segment_path(f"{SHM_DIR}/{name}")]
    except FileNotFoundError:
        return removed
    for name in names:
        path = f"{SHM_DIR}/{name}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone meanwhile, or not ours to open
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Unlinked while locked, so that a creator that waits for the lock sees it.
            if os.fstat(fd).st_nlink and remove(path):
                removed.append(path)
        except BlockingIOError:
            pass  # its creator lives
        finally:
            os.close(fd)
    return removed


def prefix() -> str:
    return f"specd-{os.getuid()}-"


def create_segment(path: str, total: int) -> int:
    """A new locked file of `total` bytes of real memory; returns its descriptor."""
    while True:
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TransportError(f"cannot create {path}: {error.strerror}") from None
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)  # a sweep took it between creation and lock
    facts = os.fstatvfs(fd)
    free = facts.f_bavail * facts.f_frsize
    try:
        if total > free:
            raise _no_space(total, free)
        os.fchmod(fd, 0o600)  # whatever the umask is
        os.posix_fallocate(fd, 0, total)
    except OSError as error:
        os.unlink(path)
        os.close(fd)
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.ENOMEM):
            raise _no_space(total, free) from None
        raise TransportError(f"cannot reserve {total} bytes in {path}: {error.strerror}") from None
    except TransportError:
        os.unlink(path)
        os.close(fd)
        raise
    return fd


def _no_space(total: int, free: int) -> NoRoomError:
    return NoRoomError(
        f"the ring needs {total / 2**20:.0f} MiB of shared memory and {SHM_DIR} has {free / 2**20:.0f} MiB free: "
        f"configure fewer or shorter slots (ring.slots, ring.slot_tokens), or enlarge {SHM_DIR} "
        f"(mount -o remount,size=…; docker run --shm-size=…)"
    )
