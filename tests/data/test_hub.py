"""Data sets of the hub: which one is asked for, and what is said when there is none."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from specd.data.rows import Source, fingerprint, locate, read_rows
from specd.errors import ConfigError, DataError, pip_install

ROWS = [{"text": "one"}, {"text": "two"}]


class Loaded(list[dict[str, str]]):
    """As a data set in memory that is cached in one file."""

    def __init__(self, file: Path) -> None:
        super().__init__(ROWS)
        self.cache_files = [{"filename": str(file)}]


def install(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_rows_of_a_split_and_a_subset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, str | None, str]] = []
    (tmp_path / "cached").touch()

    def load_dataset(name: str, subset: str | None, split: str) -> Loaded:
        asked.append((name, subset, split))
        return Loaded(tmp_path / "cached")

    install(monkeypatch, load_dataset)
    assert locate("owner/name") is None
    plain, other = Source(path="owner/name"), Source(path="owner/name", subset="main", split="test")
    assert list(read_rows(plain, limit=1)) == [("owner/name [train] row 1", ROWS[0])]
    assert [where for where, _ in read_rows(other)] == ["owner/name main [test] row 1", "owner/name main [test] row 2"]
    assert asked == [("owner/name", None, "train"), ("owner/name", "main", "test")]
    before = fingerprint(plain)
    assert fingerprint(plain) == before
    (tmp_path / "cached").write_text("more")
    assert fingerprint(plain) != before


@pytest.mark.parametrize(
    ("subset", "raised", "said"),
    [
        (
            "",
            ConnectionError("no route\nand more"),
            r"\(split 'train'\) cannot be loaded from the hub: no route; check",
        ),
        (
            "",
            ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']\nEx"
            ),
            r"has several subsets; set data\.subset to one of 'main', 'socratic'",
        ),
        (
            "mian",
            ValueError("BuilderConfig 'mian' not found. Available: ['main', 'socratic']"),
            r"has no subset 'mian'; set data\.subset to one of 'main', 'socratic'",
        ),
        (
            "",
            ValueError("Unknown split \"train\". Should be one of ['train_sft', 'test_sft']."),
            r"has no split 'train'; set data\.split to one of 'train_sft', 'test_sft'",
        ),
    ],
)
def test_what_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch, subset: str, raised: Exception, said: str) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise raised

    install(monkeypatch, load_dataset)
    with pytest.raises(DataError, match=f"^data set 'owner/name' {said}"):
        list(read_rows(Source(path="owner/name", subset=subset)))


def test_the_words_are_those_of_datasets_itself(tmp_path: Path) -> None:
    """On a folder with two subsets and a split of its own, which it loads as it loads one of the hub."""
    import datasets

    from specd.data.hub import _refused

    for name in ("main", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text('{"text": "one"}\n')
    configs = "\n".join(f"- config_name: {name}\n  data_dir: {name}" for name in ("main", "other"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    asked = [("", "test", "subset"), ("mian", "test", "subset"), ("main", "train", "split")]
    for subset, split, setting in asked:
        with pytest.raises(ValueError, match=r"\S") as caught:
            datasets.load_dataset(str(tmp_path), subset or None, split=split, cache_dir=str(tmp_path / "cache"))
        assert f"set data.{setting} to one of" in str(_refused("owner/name", subset, split, caught.value))


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=re.escape(pip_install("hub"))):
        list(read_rows("owner/name"))
