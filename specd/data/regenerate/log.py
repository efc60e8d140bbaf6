"""Answers of an unfinished file: kept one by one, found again by their question."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from specd.data.regenerate.talk import Reply
from specd.errors import ConfigError

logger = logging.getLogger(__name__)


class LogLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the log. key: of the question."""

    key: str
    reply: Reply


def settings_of(out: Path) -> dict[str, Any]:
    """The settings under which the unfinished work on `out` was begun; empty without any."""
    try:
        with unfinished(out).open("rb") as file:
            return msgspec.json.decode(file.readline(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError):
        return {}


def unfinished(out: Path) -> Path:
    """Where answers for `out` are kept until all are there."""
    return out.with_name(out.name + ".partial")


class AnswerLog:
    """The file of answers: its first line holds the settings they were given under, each further one an answer.

    What a killed process was writing is dropped. Only the places of the answers are in memory.
    """

    __slots__ = ("_file", "_places", "path")

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises ConfigError when it cannot be written, is in use, or holds work under other settings."""
        self.path = path
        self._places: dict[str, int] = {}
        with self.writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        try:
            with self.writing():
                self._open(settings)
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Reply:
        self._file.seek(self._places[key])
        return msgspec.json.decode(self._file.readline(), type=LogLine).reply

    def __setitem__(self, key: str, reply: Reply) -> None:
        """Keep an answer: it is there even if this process is killed next."""
        with self.writing():
            place = self._file.seek(0, 2)
            self._file.write(msgspec.json.encode(LogLine(key=key, reply=reply)) + b"\n")
            self._file.flush()
        self._places[key] = place

    def remove(self) -> None:
        self._places.clear()
        self.close()

    def close(self) -> None:
        """An empty log leaves no file behind."""
        if not self._places and not self._file.closed:
            self.path.unlink(missing_ok=True)
        self._file.close()

    def _open(self, settings: Mapping[str, Any]) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{str(self.path)!r} is being written by another process; wait for it, or give another --output"
            ) from None
        self._file.seek(0)
        head = self._file.readline()
        if head.endswith(b"\n"):
            self._check(head, settings)
            self._index()
            logger.info("%s: resuming after %d answers", self.path, len(self))
        else:
            self._file.truncate(0)
            self._file.write(msgspec.json.encode(dict(settings), order="deterministic") + b"\n")
            self._file.flush()

    def _check(self, head: bytes, settings: Mapping[str, Any]) -> None:
        try:
            found = msgspec.json.decode(head, type=dict[str, Any])
        except msgspec.DecodeError:
            found = {}
        asked = msgspec.to_builtins(dict(settings))
        if found == asked:
            return
        names = [name for name in asked if found.get(name) != asked[name]]
        other = ", ".join(f"{name}={found.get(name)!r}, now {asked[name]!r}" for name in names)
        raise ConfigError(
            f"{str(self.path)!r} holds unfinished work of another regeneration ({other or 'other settings'}); give "
            f"its settings to resume it, remove it, or give another --output"
        )

    def _index(self) -> None:
        place = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):  # cut off by a crash
                self._file.truncate(place)
                return
            try:
                self._places[msgspec.json.decode(line, type=LogLine).key] = place
            except msgspec.DecodeError as error:
                raise ConfigError(
                    f"{str(self.path)!r} is damaged at byte {place} ({error}); remove it, or cut it off there to "
                    f"keep the {len(self)} answers before"
                ) from None
            place += len(line)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError, as of a full disk, into a ConfigError."""
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"cannot write {str(self.path)!r}: {error.strerror or error}; free some space there or give an "
                f"--output in a writable folder, and the same command resumes"
            ) from None
