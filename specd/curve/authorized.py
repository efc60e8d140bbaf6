"""Whom a daemon lets in: a file with a name and a public key a line, like ssh's, and comments, `#…`."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from specd.curve.keys import check_name, check_public, config_dir, make_directory, read_lines, unwritable
from specd.errors import ConfigError
from specd.paths import replacing

log = logging.getLogger(__name__)

_GONE = (FileNotFoundError, NotADirectoryError, PermissionError)
"""What says that there is no such file for this user, and not that it cannot be read just now."""


def authorized_path(path: str = "") -> Path:
    """`path`, or the file `authorized` among this user's keys."""
    return Path(os.path.expanduser(path)) if path else config_dir() / "authorized"


def parse(lines: Iterable[str], where: str) -> tuple[dict[str, str], list[str]]:
    """Names by public key, and what is wrong with lines that let nobody in. Text behind a key is a comment, too."""
    found: dict[str, str] = {}
    problems: list[str] = []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        name, public = (*line.split(), "")[:2]
        try:
            check_name(name)
            check_public(public, f"the key of {name},")
        except ConfigError as error:
            problems.append(f"{where}: {error}")
            continue
        if public in found or name in found.values():
            problems.append(f"{where}: {name} or its key is there twice, expected each once")
        else:
            found[public] = name
    return found, problems


def read(path: Path) -> tuple[dict[str, str], list[str]]:
    """As `parse`, of a file. Raises ConfigError when it is missing, or somebody else could write it."""
    return parse(read_lines(path, "authorized file", 0o022, "`specd keys allow NAME PUBLIC` makes it"), str(path))


def allow(path: Path, name: str, public: str) -> bool:
    """Let the holder of a key in, under a name; False if it is already. Raises ConfigError for one that is taken."""
    check_name(name)
    check_public(public)
    with _changing(path) as lines:
        known, problems = parse(lines, str(path))
        if problems:
            raise ConfigError(problems[0])
        if known.get(public) == name:
            return False
        if name in known.values():
            raise ConfigError(f"{name} has another key in {path}: take it out first, with `specd keys revoke {name}`")
        if public in known:
            raise ConfigError(f"that key is {known[public]}'s already, in {path}: expected one name a key")
        lines.append(f"{name} {public}")
    return True


def revoke(path: Path, name: str) -> None:
    """Take out the key of a name, whatever the other lines hold. Raises ConfigError when there is none."""
    with _changing(path) as lines:
        kept = [line for line in lines if line.split()[:1] != [check_name(name)]]
        if len(kept) == len(lines):
            names = ", ".join(sorted(parse(lines, str(path))[0].values())) or "nobody"
            raise ConfigError(f"{name!r} is not in {path}: it lets in {names}")
        lines[:] = kept


class Authorized:
    """The file of those a daemon lets in, read again when it changes.

    Raises ConfigError when it is malformed at first. Later a line that is none lets nobody in, and a file that is
    missing, or that others could write, nobody at all: the log says so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] | None = None
        self._seen = self._stamp()
        self._names: dict[str, str] = {}
        if self._seen is None:
            log.warning("nobody is let in before `specd keys allow NAME PUBLIC`: there is no %s", path)
            return
        self._names, problems = read(path)
        if problems:
            raise ConfigError(problems[0])

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, public: str) -> bool:
        return public in self._names

    def name(self, public: str) -> str:
        """The name of a key, empty for a stranger's."""
        return self._names.get(public, "")

    def refresh(self) -> bool:
        """Read the file again if it changed; returns whether it did."""
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        try:
            self._names, problems = read(self.path)
        except ConfigError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, _GONE):
                log.warning("whom it lets in stays as it was: %s", error)  # such as no descriptor left: try again
                return False
            self._names, problems = {}, [f"nobody is let in: {error}"]
        self._seen = stamp
        for problem in problems:
            log.error("%s", problem)
        log.info("%s lets in %d keys", self.path, len(self._names))
        return True

    def _stamp(self) -> tuple[int, ...] | None:
        try:
            facts = self.path.stat()
        except _GONE:
            return None
        except OSError:
            return self._seen
        return facts.st_mtime_ns, facts.st_ino, facts.st_size, facts.st_mode, facts.st_uid


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[str]]:
    """The file's lines, to be changed; put in its place in one step, and by one process at a time."""
    try:
        if path.parent == config_dir():
            make_directory(path.parent)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise unwritable(path, error) from None
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        before: list[str] = []
        if path.exists():
            read(path)
            before = path.read_text(encoding="ascii").splitlines()
        after = list(before)
        yield after
        if after != before:
            with replacing(path.resolve(), 0o600) as file:
                file.write("".join(f"{line}\n" for line in after).encode())
            os.fsync(directory)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        os.close(directory)
