"""`specd data show`: which rows it shows, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chats import talk, write_rows
from shown_rows import HELLO, ODD, shown
from specd.cli.main import run
from specd.cli.show import numbers
from specd.errors import ConfigError

pytestmark = pytest.mark.usefixtures("own_cache")


def test_several_rows_are_shown_each_as_what_it_is(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    rows: list[dict[str, Any]] = [
        HELLO,
        ODD,
        {"messages": talk("Hi")},
        {"input_ids": [1, 999]},
        {"messages": talk("Ho", "Ha.")},
        HELLO,
    ]
    write_rows(file, *rows)
    file.write_text(file.read_text().replace('{"messages": [{"role": "user", "content": "Ho"', '{"mess', 1))
    text = shown(capsys, file, "--model", model, "--row", "6,1-5", code=1)
    heads = [line for line in text.splitlines() if line.startswith("row ")]
    assert [head.partition(" ─")[0] for head in heads] == [f"row {n}, a.jsonl line {n}" for n in range(1, 7)]
    parts = text.split("row ")[1:]
    assert "⟦Hello.<|im_end|>⟧" in parts[0]
    assert "cannot be used: a.jsonl line 2: turn 1 has role 'robot'; expected" in parts[1]
    assert "left out of training: dflash needs 2 labels in a row" in parts[2]
    assert "cannot be used: a.jsonl line 4: `input_ids` holds 999; expected tokens from 0 to 399" in parts[3]
    assert "cannot be used: a.jsonl line 5: " in parts[4]
    assert "⟦Hello.<|im_end|>⟧" in parts[5]
    assert "row 3" not in shown(capsys, file, "--model", model, "--row", "1,6")
    assert "cannot be used" in shown(capsys, file, "--model", model, "--row", "2", "--set", "data.bad_rows=skip")


def test_rows_of_several_files_are_counted_through(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [write_rows(tmp_path / name, HELLO, {"messages": talk("Hi", name)}) for name in ("a.jsonl", "b.jsonl")]
    text = shown(capsys, paths[0], "--data", paths[1], "--model", model, "--row", "2-3")
    assert "row 2, a.jsonl line 2" in text
    assert "row 3, b.jsonl line 1" in text


def test_a_row_that_is_not_there_is_said(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "a.jsonl", HELLO, HELLO)
    assert run(["data", "show", path, "--model", str(model), "--row", "1,3"]) == 1
    captured = capsys.readouterr()
    assert "⟦label⟧" in captured.out
    assert f"{path} has 2 rows, and no row 3; rows count from 1" in captured.err
    assert "row 2, " in shown(capsys, path, "--model", model, "--row", "2-99999999999999")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3", [range(3, 4)]),
        ("1-5", [range(1, 6)]),
        ("1,4,7-9", [range(1, 2), range(4, 5), range(7, 10)]),
        (" 2 - 3 ", [range(2, 4)]),
    ],
)
def test_rows_are_numbers_and_ranges(text: str, found: list[range]) -> None:
    assert [*numbers(text)] == found


@pytest.mark.parametrize("text", ["0", "-1", "5-3", "a", "1,", "", "1-", "1.5", "1 2", "1-2-3"])
def test_what_are_no_rows_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected rows from 1, as 3, 1-5 or 1,4,7-9"):
        numbers(text)


def test_a_target_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("show", "stats"):
        assert run(["data", command]) == 2
        assert "no target given: expected --model with a preset (" in capsys.readouterr().err
