"""What a path means: a file, a folder, a pattern or a hub name; and what is said of one that means nothing."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from specd.config.settings import DataConfig
from specd.data.faults import RowError
from specd.data.rows import Source, fingerprint, locate, read_rows, sources
from specd.errors import ConfigError, DataError

ROWS = [{"text": "one"}, {"text": "zwei — é"}, {"text": "three"}]


def rows(path: Path | str, **options: Any) -> list[Any]:
    return [row for _, row in read_rows(str(path), **options)]


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_a_file_and_its_first_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "one", "two", "three")
    assert list(read_rows(str(path), limit=2)) == [
        ("a.jsonl line 1", {"text": "one"}),
        ("a.jsonl line 2", {"text": "two"}),
    ]
    assert locate(str(path)) == (path,)
    path.write_text('{"text": "a"}\n{"text": }\n')
    assert isinstance(rows(path)[1], RowError)


def test_a_shipped_file_is_found_by_its_name() -> None:
    assert len(rows("specd:demo/heldout.jsonl", limit=3)) == 3


@pytest.mark.parametrize("content", [b"", b"\n \n", b"[]", b"\xef\xbb\xbf", gzip.compress(b"")])
def test_no_rows_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jsonl has no rows"):
        rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "path",
    ["", "nowhere.jsonl", "/no/where", "./a/b", "data/chats.jsonl", "specd:demo/none.jsonl", "data/a.jsonl.zst",
     "none/*", "a b/c", "x\0y"],
)  # fmt: skip
def test_no_such_file(path: str) -> None:
    with pytest.raises(
        DataError, match=r"no data at .*expected a file .*, a folder or a pattern of them, or a hub name"
    ):
        rows(path)


def test_a_folder_and_a_pattern_mean_their_files_in_natural_order(tmp_path: Path) -> None:
    write(tmp_path / "set" / "shard-10.jsonl", "ten")
    write(tmp_path / "set" / "shard-2.jsonl.gz", "two")
    parquet.write_table(pyarrow.Table.from_pylist([{"text": "three"}]), tmp_path / "set" / "shard-3.parquet")
    write(tmp_path / "set" / "more" / "shard-1.jsonl", "one", "one more")
    hidden = (".hidden.jsonl", ".cache/a.jsonl", "dataset_info.json")
    for other in (*hidden, "README.md", "README.txt", "LICENSE-data.txt.gz", "_SUCCESS", "empty.jsonl"):
        write(tmp_path / "set" / other)
    found = list(read_rows(str(tmp_path / "set")))
    assert found == [
        (str(Path("more", "shard-1.jsonl line 1")), {"text": "one"}),
        (str(Path("more", "shard-1.jsonl line 2")), {"text": "one more"}),
        ("shard-2.jsonl.gz line 1", {"text": "two"}),
        ("shard-3.parquet row 1", {"text": "three"}),
        ("shard-10.jsonl line 1", {"text": "ten"}),
    ]
    assert rows(tmp_path / "set" / "shard-*") == [{"text": "two"}, {"text": "three"}, {"text": "ten"}]
    assert rows(tmp_path / "**" / "shard-1*.jsonl") == [{"text": "one"}, {"text": "one more"}, {"text": "ten"}]
    assert rows(tmp_path / "set" / "shard-[0-9].*") == [{"text": "two"}, {"text": "three"}]
    assert rows(tmp_path / "set", limit=3) == [{"text": "one"}, {"text": "one more"}, {"text": "two"}]


def test_a_name_with_the_characters_of_a_pattern_is_a_name(tmp_path: Path) -> None:
    assert rows(write(tmp_path / "chats [1].jsonl", "one")) == [{"text": "one"}]


def test_folders_without_data_or_with_several_splits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    with pytest.raises(DataError, match=r"folder '.*' holds no data file: expected \.jsonl"):
        locate(str(tmp_path))
    write(tmp_path / "data" / "train-00000-of-00002.jsonl", "a")
    write(tmp_path / "data" / "train-00001-of-00002.jsonl", "b")
    assert len(rows(tmp_path)) == 2
    write(tmp_path / "data" / "test-00000-of-00001.jsonl", "c")
    with pytest.raises(
        DataError, match=r"several splits, '.*test-0.*' and '.*train-0.*'; give the folder or a pattern of one"
    ):
        locate(str(tmp_path))
    assert rows(tmp_path / "data" / "train*") == [{"text": "a"}, {"text": "b"}]


def test_paths_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9.jsonl")
    path = write(tmp_path / odd, "one")
    with pytest.raises(DataError, match=r"data path '.*caf\\xe9\.jsonl' is not UTF-8.*; rename it"):
        rows(path)
    assert list(read_rows(str(tmp_path))) == [("caf\\xe9.jsonl line 1", {"text": "one"})]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", "one")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    for read in (rows, lambda path: fingerprint(str(path))):
        with pytest.raises(DataError, match=r"cannot read .*a\.jsonl: Permission denied"):
            read(path)


def test_several_sources_have_weights_and_names_that_tell_them_apart(tmp_path: Path) -> None:
    paths = tuple(str(write(tmp_path / name, "one")) for name in ("a/train.jsonl", "b/train.jsonl", "c.jsonl"))
    found = sources(DataConfig(path=paths, weights=(1, 0.5, 2), subset="main", split="test"))
    assert [(source.path, source.weight, source.subset, source.split) for source in found] == [
        (path, weight, "main", "test") for path, weight in zip(paths, (1, 0.5, 2), strict=True)
    ]
    places = [next(iter(read_rows(source)))[0] for source in found]
    assert places == [f"{paths[0]} line 1", f"{paths[1]} line 1", "c.jsonl line 1"]
    assert [source.weight for source in sources(DataConfig(path=paths))] == [1, 1, 1]
    assert sources(DataConfig(path="a.jsonl")) == (Source(path="a.jsonl"),)
    with pytest.raises(ConfigError, match=r"data\.weights has 1 numbers and data\.path 3 paths"):
        sources(DataConfig(path=paths, weights=(1,)))


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a" / "x.jsonl", "one"), write(tmp_path / "b" / "y.jsonl", "one")
    same = fingerprint(str(a))
    assert fingerprint(str(b)) == fingerprint(str(b.parent)) == same
    write(b, "two")
    assert fingerprint(str(b)) != same
    other = b.with_suffix(".txt")
    other.write_bytes(a.read_bytes())
    assert fingerprint(str(other)) != same  # the same bytes, but a document
    shards = fingerprint(str(b.parent))
    write(b.parent / "z.jsonl", "three")
    assert fingerprint(str(b.parent)) != shards


def test_jsonl_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    """The memory that is in use does not grow with the file."""
    import tracemalloc

    def peak(lines: int) -> int:
        path = write(tmp_path / "a.jsonl", *("word " * 40,) * lines)
        tracemalloc.start()
        assert sum(1 for _ in read_rows(str(path))) == lines
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(20_000) < 2 * peak(1_000) + 65_536
