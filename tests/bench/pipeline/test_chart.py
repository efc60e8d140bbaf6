"""The pipeline benchmark's picture, from a made-up run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from matplotlib.figure import Figure

from pipeline_results import both_lengths
from specd.bench.pipeline import chart


def test_it_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.svg"
    chart.write(both_lengths(), path)
    text = path.read_text(encoding="utf-8")
    for words in ("Example CPU 9000 · synthetic", "log-normal lengths: ms a batch", "co-located × 2, inproc, depth 0",
                  "origin, gloo, depth 1", "1.10 × origin", "trainer computes", "bound"):  # fmt: skip
        assert words in text, words


def test_a_bar_is_of_one_batch() -> None:
    """Also where an iteration trains several, as its title says; and no mark goes through its figure."""
    rows = list(both_lengths().rows[:6])
    rows[1] = msgspec.structs.replace(rows[1], bound_ms=20.0)
    axes = Figure().subplots()
    chart.times(axes, rows)
    ends = [text.get_position()[0] for text in axes.texts]
    assert ends == pytest.approx([40.0, 20.0, 44.0, 26.0, 25.0, 15.0])
    assert [text.get_text() for text in axes.texts] == [" 40.0", " 16.0", " 44.0", " 26.0", " 25.0", " 15.0"]
    marks = [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
    assert marks == [[15.0, 15.0], [20.0, 20.0]], "one where there is a bound"


def test_a_cost_is_of_one_sample() -> None:
    axes = Figure().subplots()
    chart.costs(axes, both_lengths().rows[:3])
    texts = [text.get_text() for text in axes.texts]
    assert texts == [" 0.0800 · 1.10 × origin", " 0.0320 · 1.60 × origin", " 0.0880"]


def test_a_run_without_rows_gives_a_picture(tmp_path: Path) -> None:
    chart.write(msgspec.structs.replace(both_lengths(), rows=()), tmp_path / "pipeline.svg")
    assert "nothing was measured" in (tmp_path / "pipeline.svg").read_text(encoding="utf-8")
