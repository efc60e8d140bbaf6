"""A run goes on when the terminal that shows it does not. What it shows is tested with the report."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from runs import Source, run
from specd.protocol.batch import Batch
from specd.train.display import Display


class Terminal(io.StringIO):
    """One that may be closed."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.mark.parametrize("live", [True, False])
def test_a_closed_terminal_stops_nothing(live: bool, tmp_path: Path) -> None:
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
