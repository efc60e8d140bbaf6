"""Every kind of file gives the same rows, compressed or not; what is none is called what it is."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import ipc, parquet

from specd.data.faults import RowError
from specd.data.files import file_rows
from specd.errors import ConfigError, DataError

ROWS = [{"text": "one"}, {"text": "zwei — é"}, {"text": 'a, "quoted"\nline; and\ttabs'}]
LINES = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
CELLS = '"one"\n"zwei — é"\n"a, ""quoted""\nline; and\ttabs"\n'


def zstd(data: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(data))


def table(**options: Any) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(ROWS, **options)


def arrow(path: Path, opened: Callable[..., Any]) -> None:
    with opened(path, table().schema) as writer:
        writer.write_table(table(), max_chunksize=2)


def rows(path: Path) -> list[Any]:
    return [row for _, row in file_rows(path, path.name)]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "c.csv").write_text(f"text\n{CELLS}", encoding="utf-8")
    (tmp_path / "d.odd").write_bytes(b"\n " + LINES)
    parquet.write_table(table(), tmp_path / "e.parquet")
    arrow(tmp_path / "f.arrow", ipc.new_stream)
    arrow(tmp_path / "g.arrow", ipc.new_file)
    assert {path.name: rows(path) for path in sorted(tmp_path.iterdir())} == dict.fromkeys(
        ("a.jsonl", "b.json", "c.csv", "d.odd", "e.parquet", "f.arrow", "g.arrow"), ROWS
    )
    places = [next(file_rows(path, path.name))[0] for path in sorted(tmp_path.iterdir())]
    assert places == [
        "a.jsonl line 1", "b.json item 1", "c.csv row 1", "d.odd line 2", "e.parquet row 1", "f.arrow row 1",
        "g.arrow row 1",
    ]  # fmt: skip


@pytest.mark.parametrize("packed", [gzip.compress, zstd, bz2.compress, lzma.compress, lambda data: data])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_compression_is_known_by_its_bytes_and_a_byte_order_mark_is_none_of_the_text(
    tmp_path: Path, packed: Callable[[bytes], bytes], mark: bytes
) -> None:
    array = json.dumps(ROWS).encode()
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a"):
        for content in (LINES, array):
            (tmp_path / name).write_bytes(packed(mark + content))
            assert rows(tmp_path / name) == ROWS
    (tmp_path / "a.csv.gz").write_bytes(packed(mark + f"text\r\n{CELLS}".encode()))
    assert rows(tmp_path / "a.csv.gz") == ROWS
    (tmp_path / "a.txt.gz").write_bytes(packed(mark + b"A line.\r\nAnother.\r\n"))
    assert rows(tmp_path / "a.txt.gz") == [{"text": "A line.\nAnother.\n"}]


def test_compressed_parts_behind_each_other_are_all_read(tmp_path: Path) -> None:
    for name, packed in {"a.gz": gzip.compress, "a.zst": zstd}.items():
        (tmp_path / name).write_bytes(packed(LINES + b"\n") + packed(LINES))
        assert rows(tmp_path / name) == ROWS + ROWS


@pytest.mark.parametrize("packed", [gzip.compress, zstd, bz2.compress, lzma.compress])
def test_a_damaged_compression_is_named(tmp_path: Path, packed: Callable[[bytes], bytes]) -> None:
    whole = packed(b"".join(b'{"text": "%d"}\n' % (n * n) for n in range(2000)))
    (tmp_path / "a.jsonl").write_bytes(whole[:-300])
    with pytest.raises(DataError, match=r"^cannot read a\.jsonl: .*; check that the file is whole"):
        rows(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_bytes(whole[:40] + b"?" * 40 + whole[80:])
    with pytest.raises(DataError, match=r"^cannot read a\.jsonl: "):
        rows(tmp_path / "a.jsonl")


def test_a_lack_of_pyarrow_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(table(), tmp_path / "a.parquet")
    arrow(tmp_path / "a.arrow", ipc.new_stream)
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LINES))
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for path in tmp_path.iterdir():
        with pytest.raises(ConfigError, match=r"'pyarrow' is not installed; install it with: pip install .*parquet"):
            rows(path)


def test_what_is_no_data_is_called_what_it_is(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.jsonl", LINES)
    parquet.write_table(table(), tmp_path / "whole.parquet")
    contents = {
        (tmp_path / "a.zip").read_bytes(): "is a ZIP archive, which specd does not read; unpack it",
        b"%PDF-1.7 \x93": "is a PDF file",
        LINES.decode().encode("utf-16"): "is UTF-16 text, .*`iconv -f UTF-16",
        b"version https://git-lfs.github.com/spec/v1\noid": "is a pointer of Git LFS .*`git lfs pull",
        b"<!DOCTYPE html>\n<html>": "is a web page",
        pickle.dumps(ROWS): "is binary data of a kind that specd does not read; expected JSON",
        gzip.compress(gzip.compress(LINES)): "is compressed twice",
        gzip.compress((tmp_path / "whole.parquet").read_bytes()): "is Parquet inside of a compression",
        gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar\x0000"): "is a tar archive",
    }
    for content, said in contents.items():
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=rf"^a\.jsonl {said}") as caught:
            rows(tmp_path / "a.jsonl")
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (b'{"text": }', "no JSON", """line 2: '{"text": }' is not JSON (.*); expected one object a line"""),
        (b'"b"', "no object", "line 2: a JSON str 'b'; expected an object with the sample's columns"),
        (b"[3]", "no object", r"line 2: a JSON list \[3\]; expected an object"),
        (b'{"text": "\xff"}', "no UTF-8", r"line 2: byte 11 is not UTF-8"),
        (b"\x01\x02\xfe\xff", "no UTF-8", r"line 2: byte 3 is not UTF-8"),
        (b'{"text": "\\ud83d"}', "no JSON", "line 2: .* is not JSON"),
        (b'{"text": "\\ud83d", "score": NaN}', "no JSON", "line 2: .* is not JSON"),
        (b'{"text": "cut of', "no JSON", "line 2: .* is not JSON"),
    ],
)
def test_a_bad_line_is_one_row_of_its_own(tmp_path: Path, content: bytes, kind: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "more": "%s"}\n' % (b"." * 600) + content + b'\n{"text": "c"}\n')
    first, (where, bad), last = file_rows(tmp_path / "a.jsonl", "a.jsonl")
    assert [place for place, _ in (first, last)] == ["a.jsonl line 1", "a.jsonl line 3"]
    assert last[1] == {"text": "c"}
    assert where == "a.jsonl line 2"
    assert isinstance(bad, RowError)
    assert bad.kind == kind
    with pytest.raises(RowError, match=f"^a.jsonl {said}"):
        raise bad
    assert str(bad).isprintable()


def test_numbers_that_are_none_are_null(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN}\n{"text": "NaN", "score": -Infinity}\n')
    assert rows(tmp_path / "a.jsonl") == [{"text": "a", "score": None}, {"text": "NaN", "score": None}]


def test_lists_within_lists_without_end_are_a_fault_of_their_row(tmp_path: Path) -> None:
    deep = "[" * 5000 + "]" * 5000
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": {deep}}}\n{{"text": "a"}}\n{{"tools": {deep}, "x": NaN}}\n')
    bad, good, other = rows(path)
    assert good == {"text": "a"}
    assert {error.kind for error in (bad, other)} == {"nested too deeply"}
    assert str(bad).startswith("a.jsonl line 1: ")
    path.write_text(f'[{{"text": {deep}}}, {{"text": "a"}}]')
    with pytest.raises(DataError, match=r"a\.jsonl begins with '\[' and holds lists and objects within each other"):
        rows(path)


def test_byte_order_marks_within_files_that_were_joined(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(2 * gzip.compress(b'\xef\xbb\xbf{"text": "a"}\n'))
    assert rows(tmp_path / "a.jsonl.gz") == [{"text": "a"}, {"text": "a"}]


def test_cells_of_a_table_that_python_cannot_hold(tmp_path: Path) -> None:
    odd = {
        "day": pyarrow.array([1, 2**62], pyarrow.timestamp("us")),
        "zone": pyarrow.array([1, 2], pyarrow.timestamp("us", tz="No/Where")),
    }
    parquet.write_table(pyarrow.table({"text": ["a", "b"], **odd}), tmp_path / "a.parquet")
    assert [row["text"] for row in rows(tmp_path / "a.parquet")] == ["a", "b"]
    assert rows(tmp_path / "a.parquet")[1]["day"] is None
    latin = pyarrow.array([b"a", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "b.parquet")
    good, bad = rows(tmp_path / "b.parquet")
    assert good == {"text": "a"}
    assert (bad.kind, str(bad)) == ("no UTF-8", "b.parquet row 2: byte 4 of `text` is not UTF-8; expected text")


def test_bad_items_of_an_array_and_bad_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(' [{"text": "a"}, 3]')
    good, bad = rows(path)
    assert good == {"text": "a"}
    assert "a.json item 2: a JSON int 3; expected an object" in str(bad)
    path.write_text('[{"text": "a"}')
    with pytest.raises(DataError, match=r"a\.json begins with '\[' but is no JSON array"):
        rows(path)
    path.write_text('{\n  "data": [\n    {"text": "a"}\n  ]\n}\n')
    with pytest.raises(DataError, match=r"a\.json begins with a JSON object over several lines; .*`jq -c`"):
        rows(path)


def test_arrow_inside_of_a_compression_is_called_that(tmp_path: Path) -> None:
    for number, opened in enumerate((ipc.new_stream, ipc.new_file)):
        arrow(tmp_path / "whole.arrow", opened)
        (tmp_path / f"{number}.arrow.zst").write_bytes(zstd((tmp_path / "whole.arrow").read_bytes()))
        with pytest.raises(
            DataError, match=rf"{number}\.arrow\.zst is Arrow inside of a compression, .*; decompress it"
        ):
            rows(tmp_path / f"{number}.arrow.zst")


def test_quotes_of_a_table_that_are_not_closed_do_not_swallow_its_rows(tmp_path: Path) -> None:
    for name, cells in (("a.csv", 'a,"b\nc,d\n'), ("b.tsv", 'a\t"b\nc\t"d\n')):
        header = "prompt,completion\nx,y\n" if name == "a.csv" else "prompt\tcompletion\nx\ty\n"
        (tmp_path / name).write_text(header + cells)
        with pytest.raises(DataError, match=rf"{name} is no CSV behind row 1: .*; a cell that begins with a quote"):
            rows(tmp_path / name)
    (tmp_path / "c.csv").write_text('"a\nb",text\n1,"say ""hi"""\n')
    assert rows(tmp_path / "c.csv") == [{"a\nb": "1", "text": 'say "hi"'}]


def test_tables_with_other_separators_and_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for separator in ",;\t":
        path.write_text(f"prompt{separator}completion\n\nHi{separator}Hello.\nHow{separator}are{separator}you\n")
        assert rows(path)[0] == {"prompt": "Hi", "completion": "Hello."}
        path.write_text(path.read_text() + f'Hi{separator}""\n')
        assert rows(path)[2] == {"prompt": "Hi", "completion": None}
        assert str(rows(path)[1]).endswith("has 3 cells; expected 2, one for each name in the first line")
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(rows(path)[0]["text"]) == 200_000
    path.write_bytes(b"text\n\xe9\n")
    with pytest.raises(DataError, match=r"a\.csv is no CSV in UTF-8"):
        rows(path)


def test_a_text_is_one_document_and_a_long_one_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One.\n\nTwo.\n")
    assert list(file_rows(path, "a.txt")) == [("a.txt", {"text": "One.\n\nTwo.\n"})]
    path.write_text(" \n\n")
    assert rows(path) == []
    monkeypatch.setattr("specd.data.files.PART_CHARACTERS", 20)
    for text in ("A few words.\n\nAnd others.\n" * 10, "A few words\n" * 20, "word " * 30, "A\n\n" + "b" * 90):
        path.write_text(text)
        parts = list(file_rows(path, "a.txt"))
        assert "".join(row["text"] for _, row in parts if isinstance(row, dict)) == text
        assert [where for where, _ in parts] == [f"a.txt part {number + 1}" for number in range(len(parts))]
        assert len(parts) > 2
        assert not text.startswith("A few") or all(row["text"].endswith("\n") for _, row in parts)  # type: ignore[index]
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt is no text in UTF-8"):
        rows(path)


def test_bad_tables_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"cannot read a\.parquet as Parquet after row 0"):
        rows(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(LINES)
    with pytest.raises(DataError, match=r"a\.parquet is called Parquet and is text"):
        rows(tmp_path / "a.parquet")
    for content in (b"ARROW1 not really", b"not at all"):
        (tmp_path / "a.arrow").write_bytes(content)
        with pytest.raises(DataError, match=r"cannot read a\.arrow as Arrow after row 0"):
            rows(tmp_path / "a.arrow")
