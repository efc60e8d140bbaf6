"""Prepared data on disk: arrays that grow as rows are read, and are memory-mapped when they are whole."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import msgspec
import numpy as np
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray

from specd.data.images import content
from specd.data.portion import Portion, Report
from specd.errors import DataError

logger = logging.getLogger(__name__)

ARRAYS = {
    "tokens": np.int32, "loss_mask": np.bool_, "starts": np.int64, "rows": np.int64,
    "pictures": np.uint8, "picture_samples": np.int64, "picture_ends": np.int64, "picture_digests": np.uint8,
}  # fmt: skip
"""pictures: what is kept of images, of each sample that has any; picture_samples, picture_ends: which, and where to;
picture_digests: of what they show, wherever they lie."""
_TEXT = ("tokens", "loss_mask", "starts")
_SHOWN = ("picture_samples", "picture_digests")
_CHUNK_BYTES = 1 << 20


class Stored(NamedTuple):
    """What is kept of a data set. arrays: see `Dataset`; memory-mapped. digest: of its samples, whatever the rows."""

    arrays: dict[str, NDArray[Any]]
    report: Report
    digest: str


def load(place: Path) -> Stored | None:
    """What is kept at `place`; None when it is missing or damaged."""
    if not place.is_dir():
        return None
    try:
        return _read(place)
    except (OSError, ValueError, EOFError, IndexError, msgspec.MsgspecError) as error:
        logger.warning("cached data in %s is damaged (%s); preparing it again", place, error)
        shutil.rmtree(place, ignore_errors=True)
        return None


class Scratch:
    """A data set that is being written: a context manager that leaves nothing behind but what `keep` keeps."""

    __slots__ = ("_counts", "_directory", "_files", "_home", "_stack")

    def __init__(self, home: Path) -> None:
        """home: where it will be kept. One that cannot be written is logged, and only costs preparing it again."""
        self._home: Path | None = home
        self._stack = ExitStack()
        try:
            home.mkdir(parents=True, exist_ok=True)
            self._directory = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
        except OSError as error:
            logger.warning("cannot keep prepared data in %s: %s; set data.cache_dir", home, error.strerror)
            self._home, self._directory = None, Path(tempfile.mkdtemp(prefix="specd-data-"))
        self._stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
        self._files: dict[str, BinaryIO] = {}
        self._counts = dict.fromkeys(ARRAYS, 0)

    def __enter__(self) -> Self:
        with _reported(self._directory.parent):
            for name in ARRAYS:
                self._files[name] = self._stack.enter_context((self._directory / f"{name}.npy").open("wb"))
                _head(self._files[name], name, 0)
            self._append("starts", np.zeros(1, np.int64))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what a full disk did not take, once more
            self._stack.close()

    def add(self, portion: Portion, first_row: int) -> None:
        """Append samples. first_row: how many rows came before theirs. Raises DataError when the disk is full."""
        tokens, sample, kept = (self._counts[name] for name in ("tokens", "rows", "pictures"))
        illustrated = [number for number, each in enumerate(portion.pictures) if each]
        pictures = [portion.pictures[number] for number in illustrated]
        with _reported(self._directory.parent):
            self._append("tokens", portion.tokens)
            self._append("loss_mask", portion.loss_mask)
            self._append("starts", tokens + np.cumsum(portion.lengths))
            self._append("rows", first_row + portion.rows)
            self._append("pictures", np.frombuffer(b"".join(pictures), np.uint8))
            self._append("picture_digests", np.frombuffer(b"".join(map(content, pictures)), np.uint8))
            self._append("picture_samples", sample + np.array(illustrated, np.int64))
            self._append("picture_ends", kept + np.cumsum([len(each) for each in pictures], dtype=np.int64))

    def keep(self, name: str, report: Report) -> Stored:
        """The finished data set, under `name` in the home if that can be written."""
        with _reported(self._directory.parent):
            for array, file in self._files.items():
                file.seek(0)
                _head(file, array, self._counts[array])
                file.close()
            (self._directory / "report.json").write_bytes(msgspec.json.encode(report))
        stored = _read(self._directory)  # the files stay open where their names are removed
        if self._home is not None:
            try:
                os.rename(self._directory, self._home / name)
            except OSError as error:  # another process was first, with the same content
                if not (self._home / name).is_dir():
                    logger.warning("cannot keep prepared data in %s: %s", self._home / name, error.strerror)
        return stored

    def _append(self, name: str, array: NDArray[Any]) -> None:
        self._files[name].write(np.ascontiguousarray(array, ARRAYS[name]).data)
        self._counts[name] += array.size


@contextmanager
def _reported(directory: Path) -> Iterator[None]:
    """Turn an OSError of a block that writes in `directory` into a DataError; mostly the disk is full."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write prepared data in {directory}: {error.strerror}; free some space there, or set data.cache_dir"
        ) from None


def _head(file: BinaryIO, name: str, size: int) -> None:
    """The head of an .npy file, which is of one length whatever the size."""
    kind = np.dtype(ARRAYS[name]).str
    write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": (size,)})


def _read(place: Path) -> Stored:
    report = msgspec.json.decode((place / "report.json").read_bytes(), type=Report)
    arrays: dict[str, NDArray[Any]] = {}
    digest = hashlib.blake2b(digest_size=16)
    for name, kind in ARRAYS.items():
        array = np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if array.dtype != kind or array.ndim != 1:
            raise ValueError(f"{name} is {array.dtype} {array.shape}")
        if name in _TEXT or (array.size and name in _SHOWN):
            _add_file(digest, place / f"{name}.npy", array.offset)
        arrays[name] = array
    if not (arrays["starts"][-1] == arrays["tokens"].size == arrays["loss_mask"].size == report.tokens):
        raise ValueError("the arrays do not belong together")
    if not (arrays["starts"].size - 1 == arrays["rows"].size == report.samples):
        raise ValueError("the arrays do not belong together")
    ends = arrays["picture_ends"]
    if not arrays["picture_samples"].size == ends.size == report.illustrated or (
        ends.size and ends[-1] != arrays["pictures"].size
    ):
        raise ValueError("the arrays do not belong together")
    return Stored(arrays, report, digest.hexdigest())


def _add_file(digest: hashlib.blake2b, path: Path, offset: int) -> None:
    """Add a file's bytes from `offset` on; read, as mapped pages would count as memory of this process."""
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
