"""All formats give the same rows, and every failure names its location."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specd.data.rows import fingerprint, locate, read_rows
from specd.errors import ConfigError, DataError, pip_install

ROWS = [{"text": "one"}, {"text": "zwei — é"}, {"text": "three"}]


def rows(path: Path | str, **options: Any) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(str(path), **options)]


def test_jsonl_array_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    assert rows(tmp_path / "a.jsonl") == rows(tmp_path / "b.json") == rows(tmp_path / "c.parquet") == ROWS
    assert rows(tmp_path / "a.jsonl", limit=2) == ROWS[:2]
    wheres = [next(iter(read_rows(str(tmp_path / name))))[0] for name in ("a.jsonl", "b.json", "c.parquet")]
    assert wheres == ["a.jsonl line 1", "b.json item 1", "c.parquet row 1"]


def test_a_shipped_file_is_found_by_its_name() -> None:
    assert len(rows("specd:demo/heldout.jsonl", limit=3)) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text": }\n', r"a\.jsonl line 2 is not JSON .*expected one object a line"),
        (b'{"text": "a"}\n"b"\n', r"a\.jsonl line 2 holds a JSON str; expected an object"),
        (b'{"text": "\xff"}\n', r"a\.jsonl line 1 is not JSON"),
        (b'[{"text": "a"}, 3]', r"a\.jsonl item 2 holds a JSON int"),
        (b'[{"text": "a"}', r"a\.jsonl begins with '\[' but is no JSON array"),
        (b"", r"has no rows"),
        (b"\n \n", r"has no rows"),
    ],
)
def test_bad_content_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=said):
        rows(tmp_path / "a.jsonl")


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"cannot read '.*a\.parquet' as Parquet"):
        rows(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "path", ["", "nowhere.jsonl", "/no/where", "./a/b", "data/chats.jsonl", "specd:demo/none.jsonl"]
)
def test_no_such_file(path: str) -> None:
    with pytest.raises(
        DataError, match=r"no data file at .*expected a \.jsonl, \.json or \.parquet file, or a hub name"
    ):
        rows(path)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a directory"):
        rows(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    for read in (rows, lambda path: fingerprint(str(path))):
        with pytest.raises(DataError, match=r"cannot read .*Permission denied"):
            read(tmp_path / "a.jsonl")


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert locate("owner/name") is None
    assert list(read_rows("owner/name", split="test", limit=1)) == [("owner/name [test] row 1", ROWS[0])]
    assert asked == [("owner/name", "test")]


def test_an_unreachable_hub_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, split: str) -> None:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    with pytest.raises(
        DataError, match=r"'owner/name' \(split 'train'\) cannot be loaded from the hub: no route to the hub;"
    ):
        rows("owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=re.escape(pip_install("hub"))):
        rows("owner/name")


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text("{}\n")
    b.write_text("{}\n")
    same = fingerprint(str(a))
    assert fingerprint(str(b)) == same
    b.write_text("{ }\n")
    assert fingerprint(str(b)) != same
