"""The pictures of a report: what their axes show, and what one odd step must not hide."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation

from specd.report import figures
from step_records import record, timed


def heights(line: Line2D) -> list[float]:
    values: list[float] = np.asarray(line.get_ydata()).tolist()
    return values


@pytest.fixture
def axes() -> Axes:
    drawn: Axes = Figure().subplots()
    return drawn


@pytest.mark.parametrize("steps", [2, 3, 10, 20, 21, 22, 40, 41, 61, 101, 2000])
def test_a_step_that_compiles_does_not_flatten_the_time_of_the_others(axes: Axes, steps: int) -> None:
    figures.time_split(axes, [timed(1, 15.0), *(timed(step, 0.08) for step in range(2, steps + 1))])
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert top == pytest.approx(1.3 * 80)
    assert axes.get_ylabel() == "time (ms per step)"
    assert [text.get_text() for text in axes.texts] == ["15.0 s at step 1"]
    drawn = [np.asarray(layer.get_paths()[0].vertices)[:, 1].max() for layer in axes.collections]
    assert max(drawn) > top, "it leaves the picture instead of being left out"


@pytest.mark.parametrize(("step_s", "unit", "height"), [(0.08, "ms", 80), (2.0, "s", 2.0)])
def test_even_steps_keep_their_whole_height(axes: Axes, step_s: float, unit: str, height: float) -> None:
    figures.time_split(axes, [timed(step, step_s) for step in range(1, 101)])
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert top == pytest.approx(1.3 * height)
    assert axes.get_ylabel() == f"time ({unit} per step)"
    assert not axes.texts


def test_a_capped_loss_begins_at_zero(axes: Axes) -> None:
    figures.loss(axes, [record(step, loss=30.0 if step < 3 else 2.0 + step / 1e4) for step in range(1, 201)])
    bottom, top = axes.get_ylim()
    assert bottom == 0
    assert top == pytest.approx(1.2 * 2.019, rel=1e-3)
    assert [text.get_text() for text in axes.texts] == ["30.0 at step 1"]


def test_running_mean_keeps_length_and_level() -> None:
    assert figures.running_mean([]) == []
    assert figures.running_mean([3.0] * 100) == pytest.approx([3.0] * 100)
    assert figures.running_mean([0.0, 1.0]) == [0.0, 1.0]
    smooth = figures.running_mean([float(i % 2) for i in range(200)])
    assert max(smooth[10:-10]) - min(smooth[10:-10]) < 0.15


def test_accuracy_names_the_lines_it_draws(axes: Axes) -> None:
    figures.accuracy(axes, [record(step, teacher_forced_by_offset=(0.5, 0.2, 0.1)) for step in range(1, 5)])
    assert {text.get_text() for text in axes.texts} == {"all offsets", "offset 1", "offset 3"}
    assert len({text.xy[1] for text in axes.texts if isinstance(text, Annotation)}) == 3, "none lies on another"
    assert [heights(line)[-1] for line in axes.lines] == pytest.approx([25, 50, 10])


def test_acceptance_has_a_line_for_each_evaluation(axes: Axes) -> None:
    figures.acceptance(axes, {"untrained": (0.0, 0.0), "trained": (0.3, 0.1)})
    assert [heights(line) for line in axes.lines] == [[0, 0], [30, 10]]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["untrained", "trained"]
    assert axes.get_ylim()[1] == pytest.approx(33)


def test_steps_without_a_loss_leave_gaps(axes: Axes) -> None:
    steps = [record(step, loss=None, teacher_forced_accuracy=None, teacher_forced_by_offset=()) for step in (1, 2)]
    figures.loss(axes, steps)
    figures.accuracy(axes, steps)
    figures.time_split(axes, steps)
    assert not axes.texts
