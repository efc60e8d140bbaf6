"""The display of a run on a terminal, and a run that goes on when its terminal is closed."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from runs import Source, run
from specd.protocol.batch import Batch
from specd.train.display import Display, sparkline
from specd.train.journal import TrainedBatch
from step_records import measurement, record


class Terminal(io.StringIO):
    """A terminal that may be closed."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("live", [True, False])
def test_a_closed_terminal_does_not_stop_a_run(live: bool, tmp_path: Path) -> None:
    terminal = Terminal()

    def close(batch: Batch) -> None:
        terminal.gone = (batch.epoch, batch.index) >= (0, 5)

    console = Console(file=terminal, force_terminal=live, width=200)
    with Display("draft", 0, 7, lambda: {"ipc:///d.sock": "shm"}, console, every_s=0.0) as display:
        _, position = run(tmp_path, source=Source(close), sinks=[display])
    assert position.step == 7
    assert "draft" in terminal.getvalue()
    assert "step 7/7" in display.line()
    assert display.line().endswith("done")


def test_panel_shows_the_state_of_the_run() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    with Display("draft for tiny", 0, 40, lambda: {"ipc:///x": "shm"}, console) as display:
        for step in range(1, 41):
            display.step(record(step))
        display.validated(measurement(20))
        console.print(display.render())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for words in ("waiting for the first batch", "40 / 40", "0.2000", "25.0%", "250 tokens/s", "3 / 8 slots busy",
                  "target 75%", "wire 5%", "trainer 20%", "target-bound", "shm (ipc:///x)", "▁", "norm 0.1", "memory",
                  "mean of the last 20: 0.2723", "held out",
                  "loss 2.7500, 25.0% right at step 20, best 2.5000 at 10"):  # fmt: skip
        assert words in shown, words


def test_plain_lines_without_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with Display("draft for tiny", 2, 6, dict, console, every_s=1e9) as display:
        for step in range(3, 7):
            display.step(record(step))
        display.validated(measurement(10))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "draft for tiny: steps 3 to 6"
    assert [line.split(" · ")[0] for line in lines[1:3]] == ["step 3/6", "step 6/6"], (
        "the first, the last, none between"
    )
    assert "target-bound (target 75%, wire 5%, trainer 20%)" in lines[2]
    assert lines[3] == "held out · loss 2.5000, 25.0% right at step 10, the best yet"
    assert lines[4].startswith("time    ")
    assert "4 steps, 250 tokens/s, 2.0 s a step" in lines[4]
    assert lines[5] == "loss    1.3333, mean of the last 4: 1.9000"
    assert lines[8] == "went to target 75%, wire 5%, trainer 20%: target-bound"


@pytest.mark.parametrize("live", [True, False])
def test_an_epoch_ends_with_what_was_replayed_if_a_daemon_keeps_states(live: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=live, width=110, color_system=None)
    assert isinstance(console.file, io.StringIO)
    with Display("draft", 0, 4, dict, console, every_s=1e9, keeps=True) as display:
        for step, epoch in enumerate((0, 0, 1, 1), 1):
            batches = (TrainedBatch(epoch=epoch, index=step, samples=(step,)),)
            display.step(record(step, epoch=epoch, batches=batches, replayed=int(step == 4)))
        console.print(display.render())
    shown = console.file.getvalue()
    assert "epoch 1: 0% replayed, target 100%\n" in shown
    assert "epoch 2: 50% replayed, target 50%\n" in shown
    assert "states" in shown
    assert "replay  1 of 4 batches needed no forward" in shown


def test_sparkline_spans_the_blocks() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([2.0], 10) == "▁"
    assert sparkline([float(i) for i in range(800)], 8) == "▁▂▃▄▅▆▇█"


def test_a_loss_that_falls_from_far_up_still_shows_its_last_steps() -> None:
    losses = [64.0, 30.0, 12.0, *(6.0 - step / 100 for step in range(100))]
    shown = sparkline(losses, 48)
    assert shown[0] == "█"
    assert len(set(shown[12:])) == 8
    assert list(shown[12:]) == sorted(shown[12:], reverse=True)


def test_the_newest_checkpoint_has_an_age(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    display = Display("draft", 0, 9, dict, console, checkpoints=tmp_path)
    display.step(record(1))
    console.file = io.StringIO()
    console.print(display.render())
    for step in (9, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
    os.utime(tmp_path / "step-00000010", (0, time.time() - 300))
    console.print(display.render())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "none yet" in shown
    assert "step 10, 5 min 00 s old" in shown
    assert max(map(len, shown.splitlines())) <= 80
