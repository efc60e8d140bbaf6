"""The display of a run on a terminal, and a run that goes on when its terminal is closed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from runs import Source, run
from specd.protocol.batch import Batch
from specd.train.display import Display, sparkline
from step_records import record


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
