"""Directories of this user, for sockets of daemons and caches, and files that are there whole or not at all."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from specd.errors import ConfigError

_MINE = "expected one of this user's, mode 700; set XDG_RUNTIME_DIR, or name the --endpoint of your own daemon"


def runtime_dir() -> Path:
    """Where this user's daemons keep their sockets: 0700, under XDG_RUNTIME_DIR or the temporary directory."""
    base = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(base) / f"specd-{os.getuid()}"


def make_runtime_dir() -> Path:
    """`runtime_dir`, created if missing. Raises ConfigError if that fails, and as `check_private` does."""
    directory = runtime_dir()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"runtime directory {str(directory)!r}: cannot write there ({error.strerror}); set XDG_RUNTIME_DIR to a "
            f"directory that is yours"
        ) from None
    check_private(directory)
    return directory


def check_private(directory: Path) -> None:
    """Raise ConfigError unless a directory is private to this user: it holds a daemon's sockets."""
    _check_link(directory)
    facts = directory.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(
            f"directory {directory} has mode {facts.st_mode & 0o777:o} and owner {facts.st_uid}: the daemon's "
            f"sockets need one of mode 700 that is yours"
        )


def check_socket(path: Path) -> None:
    """Raise ConfigError unless a daemon's socket, where there is one, is this user's or root's, as is its directory.

    Whoever owns it is sent a trainer's tokens, and believed.
    """
    try:
        _check_link(path.parent)
        directory, socket = path.parent.stat(), path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"endpoint ipc://{path}: {error.strerror}") from None
    if not stat.S_ISSOCK(socket.st_mode):
        raise ConfigError(f"endpoint ipc://{path}: it is no socket; name the --endpoint of a daemon")
    for what, facts in ((f"directory {path.parent}", directory), (f"socket {path}", socket)):
        if facts.st_uid not in (os.getuid(), 0):
            raise ConfigError(f"{what} belongs to user {facts.st_uid}: {_MINE}")
    if directory.st_mode & 0o022 and not directory.st_mode & stat.S_ISVTX:
        raise ConfigError(
            f"directory {path.parent} has mode {directory.st_mode & 0o777:o}, so others can put a socket there: {_MINE}"
        )


def _check_link(directory: Path) -> None:
    """Raise ConfigError for a symbolic link that another user can point elsewhere."""
    facts = directory.lstat()
    if stat.S_ISLNK(facts.st_mode) and facts.st_uid not in (os.getuid(), 0):
        raise ConfigError(f"directory {directory} is a symbolic link of user {facts.st_uid}: {_MINE}")


def cache_dir() -> Path:
    """Where converted targets and prepared data are kept: SPECD_CACHE, else XDG_CACHE_HOME/specd, else in HOME.

    Raises ConfigError when none of them is set and this user has no home.
    """
    if own := os.environ.get("SPECD_CACHE"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "specd"
    return home_dir("SPECD_CACHE") / ".cache" / "specd"


def being_written(path: Path) -> Path:
    """Where `replacing` writes what is to lie at `path`; a killed process leaves it behind."""
    return path.with_name(f".{path.name}.new")


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A file that takes the place of `path`, whole and on the disk, at the end of a block that does not raise.

    mode: of the file, less the umask. For one writer at a time. Raises OSError.
    """
    fresh = being_written(path)
    fresh.unlink(missing_ok=True)
    try:
        with open(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def shown(path: str | os.PathLike[str]) -> str:
    """A path for messages: bytes of it that are not UTF-8 are escaped, as in `caf\\xe9`."""
    return re.sub("[\ud800-\udfff]", _escaped, os.fspath(path))


def _escaped(surrogate: re.Match[str]) -> str:
    """What stands for a byte that is not UTF-8 (PEP 383), as that byte."""
    code = ord(surrogate[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def home_dir(instead: str) -> Path:
    """This user's home. instead: the variable that names another place; in the ConfigError of a user who has none."""
    try:
        return Path.home()
    except RuntimeError:
        raise ConfigError(
            f"user {os.getuid()} has no home directory: HOME is not set, and the system knows no such user; set "
            f"{instead} to a directory that this user can write to"
        ) from None
