"""Files that a benchmark writes: checked before minutes are spent on measuring, and replaced only when whole."""

from __future__ import annotations

from pathlib import Path

from specd.errors import ConfigError
from specd.paths import being_written, replacing


def check(option: str, path: Path) -> None:
    """Raise ConfigError unless a file can be written at `path`. option: where the path comes from, as in `--save`."""
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option} {str(path)!r}: its directory does not exist")
    if path.is_dir():
        raise ConfigError(f"{option} {str(path)!r}: it is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{option} {str(path)!r}: it is no plain file, and one would take its place; name another")
    try:
        being_written(path).touch()
        being_written(path).unlink()
    except OSError as error:
        raise ConfigError(
            f"{option} {str(path)!r}: it cannot be written ({error.strerror}); name another file"
        ) from None


def write(path: Path, content: bytes) -> None:
    """Replace the file at `path` at once. Raises OSError."""
    with replacing(path) as file:
        file.write(content)
