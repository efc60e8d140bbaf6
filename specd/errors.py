"""The error tree: every failure a person can meet, each with a message that names value, expectation and remedy.

SpecdError
├── ConfigError        a flag, a config key, a path or a missing extra
├── DataError          a data file or a sample that cannot be used
├── ProtocolError      a peer sent something the protocol forbids
├── DaemonError        a daemon cannot be reached, did not answer in time, or will not start
├── RejectedError      a daemon answered, and refused: contract, CaptureSpec or limits do not match
├── BatchError         one batch cannot be captured; the message names it
├── TransportError     a transport cannot be used here, or a transfer failed its check
├── TargetError        the target cannot be loaded or run
├── PeerError          another process of a data-parallel run ended, or was lost
└── CheckpointError    a checkpoint cannot be written, read or resumed
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISTRIBUTION = "specd-daemon"
"""What pip knows specd as: `specd` on the public package index is another project."""


class SpecdError(Exception):
    """Root of all errors that specd raises on purpose. The CLI prints them without a traceback."""


class ConfigError(SpecdError):
    """A flag, a config key, a path or a missing extra."""


class DataError(SpecdError):
    """A data file or a sample that cannot be used."""


class ProtocolError(SpecdError):
    """A peer sent something the protocol forbids."""


class DaemonError(SpecdError):
    """A daemon cannot be reached, did not answer in time, or will not start."""


class RejectedError(SpecdError):
    """A daemon answered, and refused."""


class BatchError(SpecdError):
    """One batch cannot be captured."""


class TransportError(SpecdError):
    """A transport cannot be used here, or a transfer failed its check.

    lost: the side that raises it can only be closed from now on; a trainer has to attach again.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


class TargetError(SpecdError):
    """The target cannot be loaded or run."""


class PeerError(SpecdError):
    """Another process of a data-parallel run ended, or was lost.

    code: the exit code that the run ends with. said: another process tells the person. interrupted: by a signal.
    """

    def __init__(self, message: str, *, code: int = 1, said: bool = False, interrupted: bool = False) -> None:
        super().__init__(message)
        self.code, self.said, self.interrupted = code, said, interrupted

    def saying(self, more: str) -> PeerError:
        """The same, with more in its message."""
        return PeerError(f"{self}; {more}", code=self.code, said=self.said, interrupted=self.interrupted)


class CheckpointError(SpecdError):
    """A checkpoint cannot be written, read or resumed."""


def missing_extra(package: str, extra: str) -> ConfigError:
    """The error for an optional package that is not installed; raise it from the ImportError."""
    return ConfigError(f"package {package!r} is not installed; install it with: {pip_install(extra)}")


def pip_install(extra: str) -> str:
    """The command, quoted for a shell, that adds an extra to this very copy of specd.

    A copy that runs in its source tree, installed or not, is (re)installed from there in editable mode. An installed
    one is asked for as it came: from the directory that it was built from, if that is still there, else by its name;
    the name of what is installed makes pip fetch only what the extra lacks.
    """
    package = Path(__file__).resolve().parent
    if _is_source_tree(package.parent):
        return f"pip install -e {shlex.quote(f'{package.parent}[{extra}]')}"
    return f"pip install {shlex.quote(f'{_built_from(package) or DISTRIBUTION}[{extra}]')}"


def _built_from(package: Path) -> Path | None:
    """The source tree that an installed package says it was built from (PEP 610), if it is there."""
    import json
    from importlib import metadata
    from urllib.parse import unquote, urlsplit

    for found in metadata.distributions(name=DISTRIBUTION):
        if Path(str(found.locate_file("specd"))).resolve() != package:
            continue  # of another copy, whose path is searched later
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        place = Path(unquote(urlsplit(origin["url"]).path)) if "dir_info" in origin else None
        return place if place and _is_source_tree(place) else None
    return None


def _is_source_tree(place: Path) -> bool:
    try:
        lines = (place / "pyproject.toml").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return f'name = "{DISTRIBUTION}"' in lines


@contextmanager
def writing(path: Path, then: str = "go on with `specd resume RUN`") -> Iterator[None]:
    """Turn an OSError of a block that writes `path` into a CheckpointError; mostly the disk is full.

    then: what to do once there is room.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; free some space there, then {then}"
        ) from None


def first_line(error: BaseException) -> str:
    """First line of another library's error, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
