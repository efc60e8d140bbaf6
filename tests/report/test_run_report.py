"""Journal, display and report: what a run writes down, and how people see it."""

from __future__ import annotations

import io
import math
import re
import sys
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from runs import full_disk
from specd.config.settings import RunConfig
from specd.errors import CheckpointError, ConfigError
from specd.evaluate.results import EVALS, EvalFacts, Evaluation, Mismatch, PromptResult
from specd.report import figures
from specd.report.figures import running_mean
from specd.report.run_report import key_figures, step_over_bound, write_report
from specd.train.directory import JOURNAL, RunFacts, machine_facts, write_facts
from specd.train.display import Display, sparkline
from specd.train.journal import Journal, StepRecord, TrainedBatch, bound, read
from specd.train.tensorboard import Scalars


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "epoch": 0,
        "batches": (TrainedBatch(epoch=0, index=step, samples=(step, step + 100)),),
        "loss": 8.0 / step,
        "teacher_forced_accuracy": 0.25,
        "teacher_forced_by_offset": (0.5, 0.0, None),
        "lr": 1e-3,
        "grad_norm": 0.1,
        "weight": 3.0,
        "tokens": 500,
        "step_s": 2.0,
        "target_wait_s": 1.5,
        "wire_wait_s": 0.1,
        "train_s": 0.4,
        "forward_s": 1.6,
        "busy_slots": 3,
        "num_slots": 8,
    }
    return StepRecord(**(values | changes))


def evaluation(untrained: bool, length: float, accepted: tuple[float, ...]) -> EvalFacts:
    row = PromptResult(
        prompt_tokens=9,
        new_tokens=41,
        forwards=30,
        acceptance_length=length,
        identical=True,
        seconds=1.0,
        greedy_seconds=1.0,
    )
    result = Evaluation(
        acceptance_length=length,
        acceptance_by_offset=accepted,
        identical=True,
        mismatches=(),
        new_tokens=82,
        forwards=60,
        tokens_per_s=20.0,
        greedy_tokens_per_s=25.0,
        prompts=(row, row),
    )
    return EvalFacts(model="m", draft="d", untrained=untrained, block_size=4, max_new_tokens=41, result=result)


FACTS = RunFacts(
    started="2026-01-01 00:00 UTC",
    target={"model": "<b>tiny</b> & co"},
    draft={"block size": 4},
    data={"samples": 12},
    transports={"ipc:///tmp/x.sock": "shm"},
    machine={"processor": "abacus"},
    config=msgspec.to_builtins(RunConfig()),
)


def make_run(path: Path, steps: int = 40, evals: bool = True) -> Path:
    with Journal(path / JOURNAL) as journal:
        for step in range(1, steps + 1):
            journal.append(record(step))
    write_facts(path, FACTS)
    if evals:
        for name, facts in (
            ("untrained", evaluation(True, 1.0, (0.0, 0.0, 0.0))),
            ("trained", evaluation(False, 1.37, (0.3, 0.1, 0.0))),
        ):
            (path / EVALS[name]).write_bytes(msgspec.json.encode(facts))
    return path


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
    assert len(tags.refers) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in tags.refers)
    assert "url(" not in page
    assert "@import" not in page
    for words in (
        "1.37",
        "1.00 untrained",
        "2 of 2",
        "1 min 20 s",
        "target-bound: target 75%",
        "abacus",
        "batch_tokens",
    ):
        assert words in tags.words, words
    assert "acceptance length" in tags.words
    assert "divided by target forwards after the prompt's own" in tags.words, "the definition stands on the page"
    assert "<b>tiny</b> & co" in tags.words, "names are text, never markup"


def test_report_before_any_evaluation(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, steps=1, evals=False)).read_text()
    assert len(Tags(page).refers) == 3
    assert "run specd eval" in page


def test_evaluations_are_compared_only_where_they_decoded_the_same_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[str]] = []

    def draw(runs: dict[str, Any]) -> str:
        drawn.append(list(runs))
        return ""

    monkeypatch.setattr(figures, "acceptance", draw)
    untrained, trained = evaluation(True, 1.0, (0.0, 0.0, 0.0)), evaluation(False, 1.37, (0.3, 0.1, 0.0))
    fewer = msgspec.structs.replace(untrained.result, prompts=untrained.result.prompts[:1])
    make_run(tmp_path, steps=1)
    replace = msgspec.structs.replace
    for stale in (
        untrained,
        replace(untrained, result=fewer),
        replace(untrained, max_new_tokens=64),
        replace(untrained, source="other.jsonl"),
        replace(untrained, dtype="bfloat16"),
    ):
        (tmp_path / EVALS["untrained"]).write_bytes(msgspec.json.encode(stale))
        (tmp_path / EVALS["trained"]).write_bytes(msgspec.json.encode(trained))
        words = Tags(write_report(tmp_path).read_text()).words
        same = stale is untrained
        assert ("1.00 untrained" in words) is same
        assert drawn.pop() == (["untrained", "trained"] if same else ["trained"])
        source = f" of {stale.source}" if stale.source else ""
        assert f"untrained: prompts{stale.prompts}{source}, at most {stale.max_new_tokens} tokens each" in words
        assert "trained: prompts2, at most 41 tokens each" in words


def test_ties_stand_beside_what_is_identical(tmp_path: Path) -> None:
    facts = evaluation(False, 1.37, (0.3, 0.1, 0.0))
    misses = tuple(
        Mismatch(prompt=prompt, position=3, expected=1, got=2, margin=margin, rounding=0.1)
        for prompt, margin in ((0, 0.01), (1, 2.0))
    )
    facts = msgspec.structs.replace(facts, result=msgspec.structs.replace(facts.result, mismatches=misses))
    assert (facts.ties, facts.different) == (1, 1)
    make_run(tmp_path, steps=1, evals=False)
    (tmp_path / EVALS["trained"]).write_bytes(msgspec.json.encode(facts))
    assert ", 1 part at a tie" in Tags(write_report(tmp_path).read_text()).words


def test_report_survives_steps_without_a_loss(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    with Journal(tmp_path / JOURNAL) as journal:
        for step in range(1, 4):
            journal.append(record(step, loss=None, teacher_forced_accuracy=None, teacher_forced_by_offset=()))
    Tags(write_report(tmp_path).read_text())


def test_report_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*run\.json: No such file.*--output of a `specd train`"):
        write_report(tmp_path)
    write_facts(tmp_path, FACTS)
    with pytest.raises(CheckpointError, match=r"cannot read .*metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / JOURNAL).touch()
    with pytest.raises(CheckpointError, match="no finished step"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text("{]")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        write_report(tmp_path)


def test_matplotlib_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'specd[report]'")):
        write_report(make_run(tmp_path))


def test_machine_facts_name_no_host() -> None:
    facts = machine_facts()
    assert {"processor", "memory", "GPU", "torch"} <= facts.keys()
    assert "cores usable" in facts["processor"]


def test_step_over_bound_compares_with_the_slower_side() -> None:
    records = [record(1, step_s=2.0, forward_s=3.0, train_s=1.0)]
    assert step_over_bound(records, daemons=1) == pytest.approx(2 / 3)
    assert step_over_bound(records, daemons=6) == pytest.approx(2.0)
    assert step_over_bound([], daemons=1) is None


def timed(step: int, step_s: float) -> StepRecord:
    """A step of two samples that took so long."""
    return record(step, step_s=step_s, train_s=0.75 * step_s, wire_wait_s=0.05 * step_s, target_wait_s=0.2 * step_s)


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> Axes:
    """What the figures draw on."""
    drawn: Axes = Figure().subplots()

    def draw_on(draw: Callable[[Axes], None]) -> str:
        draw(drawn)
        return ""

    monkeypatch.setattr(figures, "_svg", draw_on)
    return drawn


def test_time_per_sample_of_short_steps_is_in_ms() -> None:
    tiles = {name: value for value, name, _ in key_figures([timed(step, 0.08) for step in range(1, 4)], {})}
    assert tiles["time per sample"] == "40 ms"


@pytest.mark.parametrize("steps", [2, 3, 10, 20, 21, 22, 40, 41, 61, 101, 2000])
def test_a_step_that_compiles_does_not_flatten_the_time_of_the_others(axes: Axes, steps: int) -> None:
    figures.time_split([timed(1, 15.0), *(timed(step, 0.08) for step in range(2, steps + 1))])
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert top == pytest.approx(1.3 * 80)
    assert axes.get_ylabel() == "time (ms per step)"
    assert [text.get_text() for text in axes.texts] == ["15.0 s at step 1"]
    drawn = [np.asarray(layer.get_paths()[0].vertices)[:, 1].max() for layer in axes.collections]
    assert max(drawn) > top, "it leaves the picture instead of being left out"


@pytest.mark.parametrize(("step_s", "unit", "height"), [(0.08, "ms", 80), (2.0, "s", 2.0)])
def test_even_steps_keep_their_whole_height(axes: Axes, step_s: float, unit: str, height: float) -> None:
    figures.time_split([timed(step, step_s) for step in range(1, 101)])
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert top == pytest.approx(1.3 * height)
    assert axes.get_ylabel() == f"time ({unit} per step)"
    assert not axes.texts


def test_a_capped_loss_begins_at_zero(axes: Axes) -> None:
    figures.loss([record(step, loss=30.0 if step < 3 else 2.0 + step / 1e4) for step in range(1, 201)])
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert top == pytest.approx(1.2 * 2.019, rel=1e-3)
    assert [text.get_text() for text in axes.texts] == ["30.0 at step 1"]


def test_running_mean_keeps_length_and_level() -> None:
    assert running_mean([]) == []
    assert running_mean([3.0] * 100) == pytest.approx([3.0] * 100)
    assert running_mean([0.0, 1.0]) == [0.0, 1.0]
    smooth = running_mean([float(i % 2) for i in range(200)])
    assert max(smooth[10:-10]) - min(smooth[10:-10]) < 0.15


def test_journal_keeps_floats_exactly_and_cuts_back(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with Journal(path) as journal:
        for step in range(1, 6):
            journal.append(record(step, loss=math.pi / step))
    assert [line.loss for line in read(path)] == [math.pi / step for step in range(1, 6)]
    with path.open("ab") as file:
        file.write(b'{"step": 6, "epo')
    assert len(read(path)) == 5
    with Journal(path, step=3) as journal:
        journal.append(record(4, loss=0.5))
    assert [(line.step, line.loss) for line in read(path)][3:] == [(4, 0.5)]
    with pytest.raises(CheckpointError, match="ends at step 4, the checkpoint is at step 9"):
        Journal(path, step=9)
    assert len(read(path)) == 4, "a refusal changes nothing"


def test_bound_names_the_largest_share() -> None:
    assert (bound(3, 1, 2), bound(0, 2, 1), bound(1, 1, 1)) == ("target", "wire", "trainer")
    assert record(1).bound == "target"


def test_panel_shows_the_state_of_the_run() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    with Display("draft for tiny", 0, 40, lambda: {"ipc:///x": "shm"}, console) as display:
        for step in range(1, 41):
            display.step(record(step))
        console.print(display.render())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for words in ("waiting for the first batch", "40 / 40", "0.2000", "25.0%", "250 tokens/s", "3 / 8 slots busy",
                  "target 75%", "wire 5%", "trainer 20%", "target-bound", "shm (ipc:///x)", "▁"):  # fmt: skip
        assert words in shown, words


def test_plain_lines_without_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with Display("draft for tiny", 2, 6, dict, console, every_s=1e9) as display:
        for step in range(3, 7):
            display.step(record(step))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "draft for tiny: steps 3 to 6"
    assert [line.split(" · ")[0] for line in lines[1:]] == ["step 3/6", "step 6/6"], "the first, the last, none between"
    assert "target-bound (target 75%, wire 5%, trainer 20%)" in lines[-1]


def test_sparkline_spans_the_blocks() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([2.0], 10) == "▁"
    assert sparkline([float(i) for i in range(800)], 8) == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize(("at", "kept"), [(3, [(1, 8.0), (2, 4.0), (3, 2.667)]), (0, [])])
def test_scalars_continue_after_a_resume(tmp_path: Path, at: int, kept: list[tuple[int, float]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    with Scalars(tmp_path) as scalars:
        for step in range(1, 6):
            scalars.step(record(step))
    with Scalars(tmp_path, at) as scalars:
        for step in range(at + 1, at + 4):
            scalars.step(record(step, loss=None if step == at + 2 else 9.0))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("train/loss")] == [
        *kept, (at + 1, 9.0), (at + 3, 9.0)]  # fmt: skip
    assert "teacher_forced_by_offset/01" in events.Tags()["scalars"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
def test_scalars_that_find_the_disk_full_raise_one_error(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    scalars = Scalars(tmp_path)

    def fill() -> None:
        for step in range(1, 100):
            scalars.step(record(step))

    with full_disk() as room:
        room(500)
        for write in (fill, scalars.close):
            with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}: .*; free some space there"):
                write()
    for thread in set(threading.enumerate()) - threads:
        thread.join()  # its error belongs to this test
