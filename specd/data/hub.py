"""Data sets of the Hugging Face hub, as `datasets` loads them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specd.data.files import Row
from specd.errors import DataError, first_line, missing_extra


def hub_rows(name: str, subset: str, split: str) -> Iterator[Row]:
    """The rows of the data set `name`. Raises DataError when it cannot be loaded, ConfigError without `datasets`."""
    called = f"{name} {subset}" if subset else name
    for number, value in enumerate(_load(name, subset, split), start=1):
        yield f"{called} [{split}] row {number}", dict(value)


def hub_digest(name: str, subset: str, split: str) -> bytes:
    """Digest of the files that the data set is cached in. Raises as `hub_rows`."""
    digest = hashlib.blake2b(digest_size=16)
    for cached in _load(name, subset, split).cache_files:
        state = Path(cached["filename"]).stat()
        digest.update(f"{cached['filename']}:{state.st_size}:{state.st_mtime_ns}\n".encode())
    return digest.digest()


def _load(name: str, subset: str, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise missing_extra("datasets", "hub") from None
    try:
        return datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # noqa: BLE001 - the hub's, httpx's and datasets' own errors share no base class
        raise _refused(name, subset, split, error) from None


def _refused(name: str, subset: str, split: str, error: Exception) -> DataError:
    subsets = re.search(r"(?:available configs|Available): \[(.*)\]", str(error))
    if subsets:
        problem = f"has no subset {subset!r}" if subset else "has several subsets"
        return DataError(f"data set {name!r} {problem}; set data.subset to one of {subsets[1]}")
    splits = re.search(r"Unknown split .* Should be one of \[(.*)\]", str(error))
    if splits:
        return DataError(f"data set {name!r} has no split {split!r}; set data.split to one of {splits[1]}")
    return DataError(
        f"data set {name!r} (split {split!r}) cannot be loaded from the hub: {first_line(error)}; check the name "
        f"(no file or folder is called so, either), or give a file"
    )
