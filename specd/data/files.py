"""Data files as rows: JSON, CSV and text, compressed or not, Parquet and Arrow; each known by its first bytes."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from specd.data.faults import TOO_DEEP, RowError, short
from specd.errors import DataError, missing_extra

Row = tuple[str, dict[str, Any] | RowError]
"""A row's place ("train.jsonl line 3"), for messages, and its columns, or why it has none."""

PACKED = (".gz", ".zst", ".zstd", ".bz2", ".xz")
"""Suffixes of compressed files."""
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".txt")
"""Suffixes of data files; what is called otherwise is read as JSON."""
PART_CHARACTERS = 1 << 20
"""Longest document that a text file is read as."""

_MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8."""
_PACKED_BEGINS = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\0")
_FOREIGN = (
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
    (0, b"PAR1", "Parquet inside of a compression", "decompress it"),
    (0, b"ARROW1", "Arrow inside of a compression", "decompress it"),
    (0, b"\xff\xff\xff\xff", "Arrow inside of a compression", "decompress it"),
    (0, b"%PDF", "a PDF file", "convert it to text"),
    (0, b"\xff\xfe", "UTF-16 text", "convert it with `iconv -f UTF-16 -t UTF-8`"),
    (0, b"\xfe\xff", "UTF-16 text", "convert it with `iconv -f UTF-16 -t UTF-8`"),
    (0, b"version https://git-lfs", "a pointer of Git LFS in place of the data", "fetch the data with `git lfs pull`"),
    (0, b"<!DOCTYPE html", "a web page", "download the file itself"),
    (0, b"<html", "a web page", "download the file itself"),
    (0, b"SQLite format 3", "an SQLite database", "export it as JSONL"),
    *((0, begin, "compressed twice", "decompress it") for begin in _PACKED_BEGINS),
)
"""What is no data: where it says so, by which bytes, what it is, and what to do."""


def kind(name: str) -> str:
    """The suffix that says how the rows of a file are read, without that of its compression."""
    stem, suffix = os.path.splitext(name.lower())
    return os.path.splitext(stem)[1] if suffix in PACKED else suffix


def named_as_data(name: str) -> bool:
    """Whether the name of a file is that of a data file."""
    return kind(name) in SUFFIXES or name.lower().endswith(PACKED)


def file_rows(file: Path, name: str) -> Iterator[Row]:
    """The rows of `file` in order, lazily but for a JSON array. name: of the file, for messages.

    Raises DataError when it cannot be read or is no data, ConfigError when a package for it is missing.
    """
    with _reading(name), file.open("rb") as raw:
        head = _head(raw)
        if head.startswith(b"PAR1"):
            yield from _parquet_rows(raw, name)
            return
        if (kind(name) == ".arrow" and not head.startswith(_PACKED_BEGINS)) or head.startswith(b"ARROW1"):
            yield from _arrow_rows(raw, name, in_blocks=head.startswith(b"ARROW1"))
            return
        with _unpacked(raw, head) as stream:
            yield from _text_rows(stream, name)


def _text_rows(stream: io.BufferedReader, name: str) -> Iterator[Row]:
    """The rows of an unpacked file that is read as text, a byte order mark at its begin left out."""
    head = _head(stream)
    if head.startswith(_MARK):
        stream.read(len(_MARK))
        head = head[len(_MARK) :]
    _refuse_foreign(name, head)
    if kind(name) == ".parquet" and head:
        raise DataError(f"{name} is called Parquet and is text; call it .jsonl, .csv or .txt if that is what it is")
    readers: dict[str, Callable[[io.BufferedReader, str], Iterator[Row]]]
    readers = {".txt": _documents, ".csv": _table_rows, ".tsv": _table_rows}
    yield from readers.get(kind(name), _json_rows)(stream, name)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what goes wrong below a stream into a DataError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
        raise DataError(f"cannot read {name}: {reason}; check that the file is whole and may be read") from None


def _head(stream: io.BufferedReader) -> bytes:
    return stream.peek(512)[:512]


def _unpacked(raw: io.BufferedReader, head: bytes) -> io.BufferedReader:
    """The stream behind a compression, which its first bytes tell."""
    opened: Any
    if head.startswith(b"\x1f\x8b"):
        opened = gzip.GzipFile(fileobj=raw)
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        opened = _zstd(raw)
    elif head.startswith(b"BZh"):
        opened = bz2.BZ2File(raw)
    elif head.startswith(b"\xfd7zXZ\0"):
        opened = lzma.LZMAFile(raw)  # noqa: SIM115 - its stream is closed with `raw`
    else:
        return raw
    return io.BufferedReader(opened, 1 << 16)


def _zstd(raw: io.BufferedReader) -> Any:
    try:
        from pyarrow import CompressedInputStream
    except ImportError:
        raise missing_extra("pyarrow", "parquet") from None
    return CompressedInputStream(raw, "zstd")


def _refuse_foreign(name: str, head: bytes) -> None:
    for at, begin, what, remedy in _FOREIGN:
        if head.startswith(begin, at):
            raise DataError(f"{name} is {what}, which specd does not read; {remedy}")
    if any(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head):
        raise DataError(
            f"{name} is binary data of a kind that specd does not read; expected JSON, CSV or text (compressed with "
            f"gzip or zstd, too), Parquet or Arrow"
        )


def _json_rows(stream: io.BufferedReader, name: str) -> Iterator[Row]:
    """JSON objects, one a line, or (as ShareGPT files come) one array of them."""
    number, line = 0, b"\n"
    while line and not line.strip():
        number, line = number + 1, stream.readline()
    first = line.strip()
    if first.startswith(b"["):
        yield from _array_rows(line + stream.read(), name)
        return
    if first == b"{":
        raise DataError(
            f"{name} begins with a JSON object over several lines; expected one object a line, or one array of "
            f"objects; `jq -c` writes each on a line of its own"
        )
    for place, text in enumerate(chain([first], stream), start=number):
        if text.strip():
            yield _object(f"{name} line {place}", text)


def _array_rows(data: bytes, name: str) -> Iterator[Row]:
    try:
        items = msgspec.json.decode(data, type=list[msgspec.Raw])
    except RecursionError:
        raise DataError(f"{name} begins with '[' and {TOO_DEEP}") from None
    except msgspec.DecodeError as error:
        raise DataError(
            f"{name} begins with '[' but is no JSON array: {error}; expected one array of objects, or one object a line"
        ) from None
    for number, item in enumerate(items, start=1):
        yield _object(f"{name} item {number}", bytes(item))


def _object(where: str, text: bytes) -> Row:
    text = text.removeprefix(_MARK)  # of files that were joined
    try:
        value = msgspec.json.decode(text)
    except RecursionError:
        return where, RowError(where, "nested too deeply", f"{short(text.decode(errors='replace'))} {TOO_DEEP}")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        value = _lenient(text)
        if value is None:
            return where, _not_json(where, text, error)
    if not isinstance(value, dict):
        found = f"a JSON {type(value).__name__} {short(value)}"
        return where, RowError(where, "no object", f"{found}; expected an object with the sample's columns")
    return where, value


def _not_json(where: str, text: bytes, error: Exception) -> RowError:
    try:
        found = short(text.strip().decode())
    except UnicodeDecodeError as wrong:
        return RowError(where, "no UTF-8", f"byte {wrong.start + 1} is not UTF-8; expected JSON in UTF-8")
    return RowError(where, "no JSON", f"{found} is not JSON ({error}); expected one object a line")


def _lenient(text: bytes) -> Any:
    """JSON with NaN and Infinity, as Python's own writer makes it: they become null. None for what is no JSON."""
    if b"NaN" not in text and b"Infinity" not in text:
        return None
    try:
        value = json.loads(text, parse_constant=lambda _: None)
        msgspec.json.encode(value)  # halves of surrogate pairs pass json.loads
    except (ValueError, RecursionError):
        return None
    return value


def _table_rows(stream: io.BufferedReader, name: str) -> Iterator[Row]:
    """CSV with a line of names first; its separator is the one of tab, comma and semicolon that stands there most.

    An empty cell is null.
    """
    csv.field_size_limit(2**31 - 1)
    number = 0
    with io.TextIOWrapper(stream, encoding="utf-8", newline="") as text:
        try:
            header = text.readline()
            lines = csv.reader(chain([header], text), delimiter=max(",\t;", key=header.count), strict=True)
            names = next(lines, [])
            for number, cells in enumerate(filter(None, lines), start=1):
                where = f"{name} row {number}"
                if len(cells) == len(names):
                    yield where, {key: cell or None for key, cell in zip(names, cells, strict=True)}
                else:
                    detail = f"has {len(cells)} cells; expected {len(names)}, one for each name in the first line"
                    yield where, RowError(where, "more or fewer cells than names", detail)
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is no CSV in UTF-8 behind row {number}: {error}") from None
        except csv.Error as error:
            raise DataError(
                f"{name} is no CSV behind row {number}: {error}; a cell that begins with a quote has to end with one, "
                f'and quotes in it are doubled: "say ""hi"""'
            ) from None


def _documents(stream: io.BufferedReader, name: str) -> Iterator[Row]:
    """A text file is one document; one that is too long is read in parts that end with a paragraph, else a line."""
    number, part = 0, ""
    with io.TextIOWrapper(stream, encoding="utf-8") as text:
        try:
            while read := text.read(PART_CHARACTERS):
                part += read
                if len(part) > PART_CHARACTERS:
                    end = part.rfind("\n\n") + 2 if "\n\n" in part else part.rfind("\n") + 1 or len(part)
                    number += 1
                    yield f"{name} part {number}", {"text": part[:end]}
                    part = part[end:]
        except UnicodeDecodeError as error:
            raise DataError(f"{name} is no text in UTF-8: {error}") from None
    if part.strip():
        yield f"{name} part {number + 1}" if number else name, {"text": part}


def _parquet_rows(raw: io.BufferedReader, name: str) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise missing_extra("pyarrow", "parquet") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(raw).iter_batches(batch_size=1024):
            yield from _batch_rows(batch, name, number)
            number += batch.num_rows
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read {name} as Parquet after row {number}: {error}") from None


def _batch_rows(batch: Any, name: str, before: int) -> Iterator[Row]:
    """The rows of a batch of Arrow's, `before` of the file before them; days that Python has not are null."""
    places = (f"{name} row {number}" for number in range(before + 1, before + batch.num_rows + 1))
    try:
        yield from zip(places, batch.to_pylist(), strict=True)
    except (ValueError, OverflowError):  # of dates and times beyond Python's, unknown time zones, text that is no UTF-8
        for place, where in enumerate(places):
            yield where, _cells(batch, place, where)


def _cells(batch: Any, place: int, where: str) -> dict[str, Any] | RowError:
    row: dict[str, Any] = {}
    for column, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[column] = values[place].as_py()
        except UnicodeDecodeError as wrong:
            return RowError(where, "no UTF-8", f"byte {wrong.start + 1} of `{column}` is not UTF-8; expected text")
        except (ValueError, OverflowError):
            row[column] = None
    return row


def _arrow_rows(raw: io.BufferedReader, name: str, *, in_blocks: bool) -> Iterator[Row]:
    """Arrow's stream, as `datasets` saves it, or (in_blocks) its file format."""
    try:
        from pyarrow import ArrowException, ipc
    except ImportError:
        raise missing_extra("pyarrow", "parquet") from None
    number = 0
    try:
        if in_blocks:
            opened = ipc.open_file(raw)
            batches = (opened.get_batch(place) for place in range(opened.num_record_batches))
        else:
            batches = ipc.open_stream(raw)
        for batch in batches:
            yield from _batch_rows(batch, name, number)
            number += batch.num_rows
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read {name} as Arrow after row {number}: {error}") from None
