"""Rows of a data set: a file, a folder or glob of files, or a hub name, as mappings, each with its place."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from specd.config.settings import DataConfig
from specd.data.faults import RowError
from specd.data.files import Row as Row
from specd.data.files import file_rows, kind, named_as_data
from specd.data.forms import IMAGES, TURNS
from specd.data.hub import hub_digest, hub_rows
from specd.data.images import FOLDER
from specd.errors import ConfigError, DataError
from specd.paths import shown

SHIPPED = "specd:"
"""Prefix of files that come with specd."""
DEMO = f"{SHIPPED}demo/train.jsonl"
"""Demo conversations; the answers are SmolLM2-135M-Instruct's."""
HELDOUT = f"{SHIPPED}demo/heldout.jsonl"
"""Held-out conversations of the same kind."""

_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `datasets` writes beside data."""
_ABOUT = {"readme", "license", "licence", "notice", "changelog", "requirements", "checksums"}
"""Text files that lie beside data, by the first word of their names."""
_SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "heldout"},
}


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """Where rows come from. split, subset: of a hub data set. weight: how often an epoch trains each of its samples.

    whole_names: rows are placed by their file's whole path, because files of other sources are called alike.
    """

    path: str
    split: str = "train"
    subset: str = ""
    weight: float = 1.0
    whole_names: bool = False

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
    names = [os.path.basename(path) for path in paths]
    return tuple(
        Source(path=path, split=config.split, subset=config.subset, weight=weight, whole_names=names.count(name) > 1)
        for path, name, weight in zip(paths, names, weights, strict=True)
    )


def locate(path: str) -> tuple[Path, ...] | None:
    """The files `path` means, in order, or None when it reads as a hub name (owner/name, and there is no such file).

    A folder means the data files in it and below, `*`, `?` and `[…]` what they match, `shard-2` before `shard-10`.
    Raises DataError when there is nothing, for a folder with several splits, and for a path that is not UTF-8.
    """
    if shown(path) != path:
        raise DataError(
            f"data path '{shown(path)}' is not UTF-8, and a run has to write it down; rename it, or link it under "
            f"another name"
        )
    if path.startswith(SHIPPED):
        file = Path(str(files("specd.configs").joinpath(path.removeprefix(SHIPPED))))
    else:
        file = Path(os.path.expanduser(path))
    if path and os.path.isfile(file):
        return (file,)
    if path and os.path.isdir(file):
        return _folder(file, path)
    if matched := _matched(file) if glob.has_magic(path) else ():
        return matched
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path, re.ASCII) and not named_as_data(path):
        return None
    raise DataError(
        f"no data at {path!r}: expected a file (JSONL, JSON, Parquet, Arrow, CSV or text; with .gz or .zst, too), a "
        f"folder or a pattern of them, or a hub name like owner/name; set data.path or give --data"
    )


def read_rows(source: Source | str, *, limit: int = 0) -> Iterator[Row]:
    """The rows of `source` in order, lazily; at most `limit` of them, 0 for all. What is no row comes as its RowError.

    Raises DataError for a file that cannot be read, and when there is no row at all; ConfigError when a package for
    Parquet, zstd or the hub is missing.
    """
    source = Source(path=source) if isinstance(source, str) else source
    rows = _source_rows(source)
    empty = True
    for row in islice(rows, limit or None):
        empty = False
        yield row
    if empty:
        raise DataError(f"{source} has no rows: expected one JSON object a line, or a table with at least one row")


def _source_rows(source: Source) -> Iterator[Row]:
    found = locate(source.path)
    if found is None:
        yield from hub_rows(source.path, source.subset, source.split)
        return
    top = Path(os.path.commonpath([file.parent for file in found]))
    for file in found:
        for where, row in file_rows(file, shown(file if source.whole_names else file.relative_to(top))):
            yield where, _placed(row, file.parent)


def _placed(row: dict[str, Any] | RowError, folder: Path) -> dict[str, Any] | RowError:
    """A row that may have images, with the folder that their paths begin in: its file's, or what it says itself."""
    if isinstance(row, RowError):
        return row
    turns = next((row[name] for name in TURNS if isinstance(row.get(name), list)), ())
    parts = any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns)
    if not parts and not any(row.get(name) for name in IMAGES):
        return row
    return {**row, FOLDER: str(folder / str(row.get(FOLDER) or ""))}


def fingerprint(source: Source | str) -> str:
    """Digest of the data of `source`: of the files' bytes, or of the files a hub data set is cached in."""
    source = Source(path=source) if isinstance(source, str) else source
    digest = hashlib.blake2b(digest_size=16)
    try:
        found = locate(source.path)
        if found is None:
            digest.update(hub_digest(source.path, source.subset, source.split))
        for file in found or ():
            digest.update(f"{kind(file.name)}:{file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}") from None
    return digest.hexdigest()


def _folder(folder: Path, path: str) -> tuple[Path, ...]:
    """The data files in and below `folder`, hidden ones left out."""
    found: list[Path] = []
    for place, below, names in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        found += [Path(place, name) for name in names if _is_data(name) and os.path.isfile(os.path.join(place, name))]
    if not found:
        raise DataError(
            f"folder {path!r} holds no data file: expected .jsonl, .json, .parquet, .arrow, .csv or .txt files (with "
            f".gz or .zst, too) in or below it"
        )
    found.sort(key=lambda file: _natural(file.relative_to(folder)))
    split_of = {split: file for file in found if (split := _split(file.relative_to(folder)))}
    if len(split_of) > 1:
        examples = " and ".join(repr(shown(file.relative_to(folder))) for file in split_of.values())
        raise DataError(
            f"folder {path!r} holds several splits, {examples}; give the folder or a pattern of one, as "
            f"'folder/train-*.jsonl'"
        )
    return tuple(found)


def _matched(pattern: Path) -> tuple[Path, ...]:
    found = (Path(name) for name in glob.iglob(str(pattern), recursive=True))
    return tuple(sorted((file for file in found if file.is_file()), key=_natural))


def _is_data(name: str) -> bool:
    about = kind(name) == ".txt" and re.split(r"[^a-z]", name.lower())[0] in _ABOUT
    return named_as_data(name) and not name.startswith(".") and name not in _NO_DATA and not about


def _split(file: Path) -> str:
    """The split that a file's name, or a folder on the way to it, names as a word; else the empty string."""
    words = set(re.split(r"[^a-z]+", shown(file).lower()))
    return next((split for split, names in _SPLITS.items() if words & names), "")


def _natural(file: Path) -> list[tuple[int, str]]:
    """A key that sorts `shard-2` before `shard-10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", str(file))]
