"""Directories of this user: sockets of daemons, caches."""

from __future__ import annotations

import os
from pathlib import Path

from specd.errors import ConfigError


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
    facts = directory.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(
            f"directory {directory} has mode {facts.st_mode & 0o777:o} and owner {facts.st_uid}: the daemon's "
            f"sockets need one of mode 700 that is yours"
        )


def cache_dir() -> Path:
    """Where converted targets and prepared data are kept: SPECD_CACHE, else XDG_CACHE_HOME/specd."""
    if own := os.environ.get("SPECD_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specd"
