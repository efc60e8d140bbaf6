"""Rows are counted on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from specd.data.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress("preparing data") as on_rows:
        assert on_rows is not None
        on_rows(64)
        on_rows(12_800)
    assert "preparing data" in terminal.getvalue()
    assert "12,800 rows" in terminal.getvalue()


@pytest.mark.parametrize("show", [True, False])
def test_a_pipe_or_a_quiet_run_shows_nothing(show: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO() if show else Terminal()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress("preparing data", show) as on_rows:
        assert on_rows is None
    assert not pipe.getvalue()
