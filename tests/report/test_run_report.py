"""The report of a run: a page of its own, what it compares, and what it refuses."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest

from specd.data.faults import Fault
from specd.errors import CheckpointError
from specd.evaluate.results import EVALS, Mismatch
from specd.report.run_report import comparable, key_figures, key_settings, step_over_bound, write_report
from specd.train.directory import JOURNAL, write_facts
from specd.train.measurement import append
from step_records import FACTS, evaluation, make_run, measurement, record, timed


class Tags(HTMLParser):
    """Checks nesting, collects what a page refers to and its visible words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.refers: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.refers += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_report_is_one_self_contained_page(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path)).read_text()
    tags = Tags(page)
    assert tags.refers == []
    assert page.count("<figure>") == 4
    assert "url(" not in page
    assert "@import" not in page
    for words in (
        "1.37",
        "95 %: 1.33 to 1.33, of only 2 prompts; 1.00 untrained",
        "2 of 2",
        "1 min 20 s",
        "target-bound: target 75%",
        "abacus",
        "batch_tokens",
    ):
        assert words in tags.words, words
    assert "acceptance length" in tags.words
    assert "divided by target forwards after the prompt's own" in tags.words, "the definition stands on the page"
    assert "DFlash draft for <b>tiny</b> & co" in tags.words, "names are text, never markup"


def test_report_before_any_evaluation(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, steps=1, evals=False)).read_text()
    assert page.count("<figure>") == 3
    assert "run specd eval" in page


def test_held_out_rows_are_in_the_picture_of_the_loss_and_beside_it(tmp_path: Path) -> None:
    path = make_run(tmp_path, steps=20, evals=False)
    for step in (10, 20):
        append(path / "validation.jsonl", measurement(step))
    page = write_report(path).read_text()
    for part in ("held-out loss", "the lowest, at step 10; step 20 has 2.75", "Held-out rows", "2 times, 1,234 tokens"):
        assert part in page
    assert "held out of training" in page


def test_evaluations_are_compared_only_where_they_decoded_the_same_texts() -> None:
    untrained, trained = evaluation(True, 1.0, (0.0, 0.0, 0.0)), evaluation(False, 1.37, (0.3, 0.1, 0.0))
    replace = msgspec.structs.replace
    fewer = replace(untrained.result, prompts=untrained.result.prompts[:1])
    assert list(comparable({"untrained": untrained, "trained": trained})) == ["untrained", "trained"]
    for stale in (
        replace(untrained, result=fewer),
        replace(untrained, max_new_tokens=64),
        replace(untrained, source="other.jsonl"),
        replace(untrained, dtype="bfloat16"),
    ):
        assert list(comparable({"untrained": stale, "trained": trained})) == ["trained"]
    assert list(comparable({"untrained": untrained})) == ["untrained"]


def test_every_evaluation_says_what_it_decoded(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1)
    stale = msgspec.structs.replace(evaluation(True, 1.0, (0.0, 0.0, 0.0)), max_new_tokens=64, source="other.jsonl")
    fault = Fault(kind="unknown role", rows=1200, first="other.jsonl line 3: turn 1 has role 'robot'")
    stale = msgspec.structs.replace(stale, bad=(fault,))
    (tmp_path / EVALS["untrained"]).write_bytes(msgspec.json.encode(stale))
    words = Tags(write_report(tmp_path).read_text()).words
    assert "untrained: prompts2 of other.jsonl, at most 64 tokens each" in words
    assert (
        "untrained: cannot be used, unknown role1,200, the first: other.jsonl line 3: turn 1 has role 'robot'" in words
    )
    assert "trained: prompts2, at most 41 tokens each" in words
    assert "1.00 untrained" not in words, "it stands beside nothing that decoded other texts"


def test_ties_stand_beside_what_is_identical() -> None:
    facts = evaluation(False, 1.37, (0.3, 0.1, 0.0))
    misses = tuple(
        Mismatch(prompt=prompt, position=3, expected=1, got=2, margin=margin, rounding=0.1)
        for prompt, margin in ((0, 0.01), (1, 2.0))
    )
    facts = msgspec.structs.replace(facts, result=msgspec.structs.replace(facts.result, mismatches=misses))
    assert (facts.ties, facts.different) == (1, 1)
    tiles = {name: remark for _, name, remark in key_figures([record(1)], {"trained": facts})}
    assert tiles["identical outputs"] == "82 tokens compared, 1 part at a tie"


def test_report_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*run\.json: No such file.*--output of a `specd train`"):
        write_report(tmp_path)
    write_facts(tmp_path, FACTS)
    with pytest.raises(CheckpointError, match=r"cannot read .*metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / JOURNAL).touch()
    with pytest.raises(CheckpointError, match="no finished step"):
        write_report(tmp_path)
    make_run(tmp_path, steps=2, evals=False)
    (tmp_path / JOURNAL).write_bytes((tmp_path / JOURNAL).read_bytes() * 2)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 3 is step 1, expected step 3; .*two processes"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{]")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        write_report(tmp_path)


def test_no_chart_library_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_report(make_run(tmp_path), tmp_path / "page.html").read_text().count("<figure>") == 4


def test_what_was_set_stands_above_the_charts(tmp_path: Path) -> None:
    shown = key_settings(FACTS)
    assert shown["train.lr"] == 6e-4, "always"
    assert "train.clip" not in shown
    assert "data.weights" not in shown
    config = FACTS.config | {"train": FACTS.config["train"] | {"clip": 0.5, "betas": [0.9, 0.99]}}
    changed = key_settings(msgspec.structs.replace(FACTS, config=config))
    assert {name: changed[name] for name in changed.keys() - shown.keys()} == {
        "train.clip": 0.5,
        "train.betas": "0.9, 0.99",
    }
    words = Tags(write_report(make_run(tmp_path)).read_text()).words
    assert words.index("train.lr") < words.index("Every optimizer step")


def test_step_over_bound_compares_with_the_slower_side() -> None:
    records = [record(1, step_s=2.0, forward_s=3.0, train_s=1.0)]
    assert step_over_bound(records, daemons=1) == pytest.approx(2 / 3)
    assert step_over_bound(records, daemons=6) == pytest.approx(2.0)
    assert step_over_bound([], daemons=1) is None


def test_time_per_sample_of_short_steps_is_in_ms() -> None:
    tiles = {name: value for value, name, _ in key_figures([timed(step, 0.08) for step in range(1, 4)], {})}
    assert tiles["time per sample"] == "40 ms"
