"""Rows of a data set: JSONL, JSON, Parquet or a hub name as mappings, each with its location."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from specd.config.settings import DataConfig
from specd.errors import ConfigError, DataError, missing_extra

Row = tuple[str, dict[str, Any]]
"""A row's location ("train.jsonl line 3"), for messages, and its columns."""

SHIPPED = "specd:"
"""Prefix of files that come with specd."""
DEMO = f"{SHIPPED}demo/train.jsonl"
"""Demo conversations; the answers are SmolLM2-135M-Instruct's."""
HELDOUT = f"{SHIPPED}demo/heldout.jsonl"
"""Held-out conversations of the same kind."""


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where rows come from. split, subset: of a hub data set. weight: how often an epoch trains each of its samples."""

    path: str
    split: str = "train"
    subset: str = ""
    weight: float = 1.0

    def __str__(self) -> str:
        return self.path


def sources(config: DataConfig) -> tuple[Source, ...]:
    """The sources of `config`, in order. Raises ConfigError when there are not as many weights as paths."""
    paths = (config.path,) if isinstance(config.path, str) else config.path
    weights = config.weights or (1.0,) * len(paths)
    if len(weights) != len(paths):
        raise ConfigError(
            f"data.weights has {len(weights)} numbers and data.path {len(paths)} paths: expected one for each path"
        )
    return tuple(
        Source(path=path, split=config.split, subset=config.subset, weight=weight)
        for path, weight in zip(paths, weights, strict=True)
    )


def locate(path: str) -> Path | None:
    """The file `path` means, or None when it reads as a hub name (owner/name, neither a file nor a known suffix).

    Raises DataError when it is neither, and for an empty path.
    """
    if path.startswith(SHIPPED):
        file = Path(str(files("specd.configs").joinpath(path.removeprefix(SHIPPED))))
    else:
        file = Path(path).expanduser()
    if path and file.is_file():
        return file
    if path and file.is_dir():
        raise DataError(f"data path {path!r} is a directory; give one of its .jsonl or .parquet files")
    if path.count("/") == 1 and not path.startswith((".", "/", "~", SHIPPED)) and not _suffix(path):
        return None
    raise DataError(
        f"no data file at {path!r}: expected a .jsonl, .json or .parquet file, or a hub name like owner/name; "
        f"set data.path or give --data"
    )


def read_rows(source: Source | str, *, limit: int = 0) -> Iterator[Row]:
    """The rows of `source` in order, lazily; at most `limit` of them, 0 for all.

    Raises DataError that names an unreadable line, and when there is no row at all; ConfigError when a package for
    Parquet or the hub is missing.
    """
    source = Source(path=source) if isinstance(source, str) else source
    path = source.path
    file = locate(path)
    if file is None:
        rows = _hub_rows(path, source.split)
    elif file.suffix == ".parquet":
        rows = _parquet_rows(file)
    else:
        rows = _json_rows(file)
    empty = True
    for row in islice(rows, limit or None):
        empty = False
        yield row
    if empty:
        raise DataError(f"{path} has no rows: expected one JSON object a line, or a table with at least one row")


def fingerprint(source: Source | str) -> str:
    """Digest of the data of `source`: of a file's bytes, or of the files a hub data set is cached in."""
    source = Source(path=source) if isinstance(source, str) else source
    path, split = source.path, source.split
    digest = hashlib.blake2b(digest_size=16)
    file = locate(path)
    try:
        if file is not None:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
        else:
            for cached in _hub(path, split).cache_files:
                state = Path(cached["filename"]).stat()
                digest.update(f"{cached['filename']}:{state.st_size}:{state.st_mtime_ns}\n".encode())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return digest.hexdigest()


def _suffix(path: str) -> bool:
    return path.endswith((".jsonl", ".json", ".parquet", ".txt", ".csv", ".gz", ".zst"))


def _json_rows(file: Path) -> Iterator[Row]:
    """JSON objects, one a line, or (as ShareGPT files come) one array of them."""
    try:
        with file.open("rb") as stream:
            if stream.peek(1)[:1] == b"[":
                yield from _array_rows(file.name, stream.read())
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _object(f"{file.name} line {number}", line)
    except OSError as error:
        raise DataError(f"cannot read {str(file)!r}: {error.strerror}") from None


def _array_rows(name: str, data: bytes) -> Iterator[Row]:
    try:
        items = msgspec.json.decode(data, type=list[msgspec.Raw])
    except msgspec.DecodeError as error:
        raise DataError(f"{name} begins with '[' but is no JSON array: {error}") from None
    for number, item in enumerate(items, start=1):
        yield _object(f"{name} item {number}", bytes(item))


def _object(where: str, text: bytes) -> Row:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        shown = text[:60].decode(errors="replace").strip()
        raise DataError(f"{where} is not JSON ({error}): {shown!r}…; expected one object a line") from None
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a JSON {type(value).__name__}; expected an object with the sample's columns")
    return where, value


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise missing_extra("pyarrow", "hub") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield f"{file.name} row {number}", value
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read {str(file)!r} as Parquet after row {number}: {error}") from None


def _hub_rows(name: str, split: str) -> Iterator[Row]:
    for number, value in enumerate(_hub(name, split), start=1):
        yield f"{name} [{split}] row {number}", dict(value)


def _hub(name: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "hub") from None
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # noqa: BLE001 - the hub's, httpx's and datasets' own errors share no base class
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"data set {name!r} (split {split!r}) cannot be loaded from the hub: {reason}; "
            f"check the name, or give a .jsonl or .parquet file"
        ) from None
