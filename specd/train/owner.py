"""The owner of a run's directory: one process at a time, by a lock that ends with it, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from specd.errors import ConfigError

logger = logging.getLogger(__name__)

LOCK: Final = ".lock"
"""File of the lock, with the owner's process id and host in it; a directory that holds only this is empty."""
NAME_S: Final = 1.0
"""How long an owner may take from its lock to its name in it."""
NO_LOCKS: Final = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What `flock` says on a file system without locks, such as Lustre mounted without `-o flock`."""


class _Owner(NamedTuple):
    """The process that a lock's file names."""

    pid: int
    host: str

    @property
    def lives(self) -> bool:
        """Whether it is a process of this host; of another host's nothing is known, so it is."""
        return self.host != socket.gethostname() or Path(f"/proc/{self.pid}").exists()


@contextlib.contextmanager
def owned(directory: Path) -> Iterator[None]:
    """Own `directory`, which is made if it is missing, until the block ends; threads of this process count, too.

    At the end the lock's file is removed, and each directory that was made here, if nothing else is in it.
    Raises ConfigError that names the owner if there is one already, or when nothing can be made there. Where the file
    system has no locks, a warning says so, and only a living owner of this host is seen.
    """
    made: set[Path] = set()
    try:
        lock = _make_and_lock(directory, made)
    except BaseException as error:
        _remove(made)
        if isinstance(error, OSError):
            raise ConfigError(
                f"cannot make output {str(directory)!r}: {error.strerror} ({error.filename or LOCK}): expected a "
                f"directory that may be written to; choose another --output"
            ) from None
        raise
    try:
        yield
    finally:
        # Both while it is locked: whoever comes now sees that its file is no longer the one at this path.
        if _lies_at(lock, directory / LOCK):
            with contextlib.suppress(OSError):
                os.unlink(directory / LOCK)
        _remove(made)
        os.close(lock)


def _make_and_lock(directory: Path, made: set[Path]) -> int:
    """Descriptor of the locked file. made: gets the directories that were missing."""
    limit = time.monotonic() + NAME_S
    while True:
        made |= {path for path in (directory.absolute(), *directory.absolute().parents) if not path.exists()}
        patient = time.monotonic() < limit
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = os.open(directory / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except (FileNotFoundError, FileExistsError) as error:
            # Its last owner removed the directory; mkdir may see it, and then that it is none.
            if not patient or (isinstance(error, FileExistsError) and directory.exists() and not directory.is_dir()):
                raise
            continue
        try:
            if _lock(directory, lock, patient=patient):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _lock(directory: Path, lock: int, *, patient: bool) -> bool:
    """Lock the open file and write this process's name into it; False to try again.

    patient: whether an owner that has not written its name yet is waited for.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _read(lock)
        if (owner is not None and owner.lives) or not patient:
            raise _taken(directory, owner) from None
        time.sleep(0.01)  # between its lock and its name there is nothing to wait on
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        owner = _read(lock)
        if owner is not None and owner.host == socket.gethostname() and owner.lives and owner.pid != os.getpid():
            raise _taken(directory, owner) from None
        logger.warning(
            "%s: its file system has no locks (%s), so a second process there would not be noticed: see that there is "
            "none, or choose an --output elsewhere",
            directory,
            error.strerror,
        )
    if not _lies_at(lock, directory / LOCK):
        return False  # its last owner removed it between our open and our lock
    name = f"{os.getpid()} {socket.gethostname()}\n".encode()
    with contextlib.suppress(OSError):  # on a full disk the owner has no name, but it is the owner
        os.pwrite(lock, name, 0)
        os.ftruncate(lock, len(name))
    return True


def _taken(directory: Path, owner: _Owner | None) -> ConfigError:
    who = f"process {owner.pid} on {owner.host}" if owner else "another process"
    return ConfigError(
        f"{who} trains in {str(directory)!r}: wait for its end, or stop it and go on with `specd resume "
        f"{shlex.quote(str(directory))}`, or choose another --output"
    )


def _read(lock: int) -> _Owner | None:
    """Whom the lock's file names; None while it names nobody."""
    pid, _, host = os.pread(lock, 512, 0).decode(errors="replace").partition(" ")
    return _Owner(int(pid), host.rstrip("\n")) if pid.isdecimal() and host.endswith("\n") else None


def _lies_at(lock: int, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(lock), os.lstat(path))
    except OSError:
        return False


def _remove(made: set[Path]) -> None:
    """Remove the directories that are still empty."""
    for path in sorted(made, key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
