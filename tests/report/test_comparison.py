"""Runs side by side: what is compared, what is not, and what they differ in."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from specd.errors import CheckpointError, ConfigError
from specd.evaluate.results import EVALS
from specd.report.comparison import differing, gain, key_rows, names, write_comparison
from specd.report.run_report import Run
from specd.train.directory import read_facts, write_facts
from step_records import FACTS, evaluation, make_run, record


def test_two_runs_make_one_page(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / "runs" / name, steps=steps) for name, steps in (("a<b", 40), ("c", 20)))
    facts = read_facts(second)
    write_facts(
        second,
        msgspec.structs.replace(
            facts, config=facts.config | {"train": {"lr": 0.5}, "data": {"max_length": 9}}, data={"samples": 7}
        ),
    )
    path = write_comparison([first, second])
    assert path == first / "comparison.html"
    page = path.read_text()
    assert "a&lt;b" in page
    assert "a<b" not in page
    assert '<th scope="row">train.lr</th><td>0.0006</td><td>0.5</td>' in page
    assert "data.max_length</th><td>3072</td><td>9</td>" in page
    assert "data: samples</th><td>12</td><td>7</td>" in page
    assert "src=" not in page, "nothing is loaded from elsewhere"
    assert page.count("<figure>") == 4


def test_the_page_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, steps=1, evals=False) for name in ("a", "b")]
    page = write_comparison(runs, tmp_path / "both.html").read_text()
    assert "Nothing: settings, target, data and machine are alike." in page
    assert page.count("<figure>") == 3, "no acceptance without an evaluation"
    with pytest.raises(CheckpointError, match=r"cannot write .*no-such/page\.html: No such file.*--to"):
        write_comparison(runs, tmp_path / "no-such" / "page.html")


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    paths = [tmp_path / "x" / "run", tmp_path / "y" / "run"]
    assert names(paths) == ["x/run", "y/run"]
    assert names([tmp_path / "x" / "a", tmp_path / "x" / "b"]) == ["a", "b"]
    with pytest.raises(ConfigError, match=r"run '.*y/run' is there twice: name each run once"):
        names([paths[1], tmp_path / "x" / ".." / "y" / "run"])


def test_acceptance_is_compared_on_the_same_prompts_alone(tmp_path: Path) -> None:
    one, other = evaluation(False, 1.30, (0.3, 0.1)), evaluation(False, 1.37, (0.3, 0.1))
    assert gain(one, other) == "+0.07 (95 %: +0.00 to +0.00)", "both have the same counts by prompt here"
    assert gain(one, msgspec.structs.replace(other, block_size=16)).startswith("+0.07"), (
        "how far a draft guesses is free"
    )
    for stale in (msgspec.structs.replace(other, source="x"), msgspec.structs.replace(other, max_new_tokens=7)):
        assert gain(one, stale) == "not comparable: other prompts or limits"
    assert gain(None, other) == gain(one, None) == "–"
    runs = {
        name: Run(facts=FACTS, records=[record(1)], evals={} if facts is None else {"trained": facts})
        for name, facts in (("a", one), ("b", None))
    }
    rows = key_rows(runs)
    assert rows["acceptance length"][1].startswith("none: run specd eval")
    assert rows["loss"] == ["8.00 (8.00 at the start)"] * 2
    assert {len(cells) for cells in rows.values()} == {2}
    assert "trained" in EVALS


def test_only_what_differs_is_listed() -> None:
    found = differing({"a": {"x": 1, "y": 2, "z": ""}, "b": {"x": 1, "y": 3, "new": 4, "z": None}})
    assert found == {"y": ["2", "3"], "new": ["–", "4"]}
