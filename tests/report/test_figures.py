"""The charts of a report: what they show, and what one odd step must not hide."""

from __future__ import annotations

import pytest

from specd.report import chart, figures
from step_records import record, timed


@pytest.mark.parametrize("steps", [2, 3, 10, 20, 21, 22, 40, 41, 61, 101, 2000])
def test_a_step_that_compiles_does_not_flatten_the_time_of_the_others(steps: int) -> None:
    drawn = figures.time_split([timed(1, 15.0), *(timed(step, 0.08) for step in range(2, steps + 1))])
    assert drawn.top == pytest.approx(1.2 * 80)
    assert drawn.y_label == "time (ms per step)"
    assert drawn.note == "15.0 s at step 1"
    assert max(sum(value or 0 for value in point) for point in zip(*(one.y for one in drawn.series), strict=True)) > (
        drawn.top
    ), "it leaves the picture instead of being left out"


@pytest.mark.parametrize(("step_s", "unit", "height"), [(0.08, "ms", 80), (2.0, "s", 2.0)])
def test_even_steps_keep_their_whole_height(step_s: float, unit: str, height: float) -> None:
    drawn = figures.time_split([timed(step, step_s) for step in range(1, 101)])
    assert drawn.top == pytest.approx(1.2 * height)
    assert drawn.y_label == f"time ({unit} per step)"
    assert not drawn.note


def test_a_capped_loss_says_what_lies_above() -> None:
    drawn = figures.loss([record(step, loss=30.0 if step < 3 else 2.0 + step / 1e4) for step in range(1, 201)])
    assert drawn.top == pytest.approx(1.2 * 2.019, rel=1e-3)
    assert drawn.note == "30.0 at step 1"


def test_a_long_run_keeps_its_extremes_in_few_points() -> None:
    steps = 10 * figures.MOST + 5
    drawn = figures.loss([record(step, loss=9.0 if step == 1234 else 2.0) for step in range(1, steps + 1)])
    every, mean = drawn.series
    assert len(drawn.x) <= figures.MOST
    assert drawn.labels[-1].endswith(f"to {steps:,}")
    point = next(index for index, high in enumerate(every.high) if high == 9.0)
    assert drawn.labels[point] == "steps 1,234 to 1,244" or every.said[point] == "2.0000 to 9.0000"
    assert every.low[point] == 2.0
    assert max(value or 0 for value in mean.y) < 2.2


def test_running_mean_keeps_length_and_level() -> None:
    assert figures.running_mean([]) == []
    assert figures.running_mean([3.0] * 100) == pytest.approx([3.0] * 100)
    assert figures.running_mean([0.0, 1.0]) == [0.0, 1.0]
    smooth = figures.running_mean([float(i % 2) for i in range(200)])
    assert max(smooth[10:-10]) - min(smooth[10:-10]) < 0.15


def test_accuracy_names_the_lines_it_draws() -> None:
    drawn = figures.accuracy([record(step, teacher_forced_by_offset=(0.5, 0.2, 0.1)) for step in range(1, 5)])
    assert {one.name: one.y[-1] for one in drawn.series} == pytest.approx(
        {"all offsets": 25.0, "offset 1": 50.0, "offset 3": 10.0}
    )


def test_acceptance_has_a_line_for_each_evaluation() -> None:
    drawn = figures.acceptance(
        {"untrained": (0.0, 0.0, 0.0), "trained": (0.3, 0.1)}, {"trained": ((0.2, 0.4), (0, 0.2))}
    )
    first, second = drawn.series
    assert (first.y, second.y) == ([0, 0, 0], [30, 10, None])
    assert second.said == ["30.0 % (20.0 to 40.0)", "10.0 % (0.0 to 20.0)", "–"]
    assert drawn.top == pytest.approx(1.08 * 40)
    assert "30.0 % (20.0 to 40.0)" in chart.svg(drawn, "t")


def test_steps_without_a_loss_leave_gaps() -> None:
    steps = [record(step, loss=None, teacher_forced_accuracy=None, teacher_forced_by_offset=()) for step in (1, 2)]
    for drawn in (figures.loss(steps), figures.accuracy(steps)):
        assert all(list(one.y) == [None, None] for one in drawn.series)
        assert chart.svg(drawn, "t")


def test_runs_of_different_lengths_share_an_axis() -> None:
    drawn = figures.compared(
        {"a": [record(step, loss=1.0) for step in range(1, 4)], "b": [record(step, loss=2.0) for step in (1, 2)]},
        lambda one: one.loss,
        "loss",
        "{:.1f}",
    )
    assert [one.y for one in drawn.series] == [[1.0, 1.0, 1.0], [2.0, 2.0, None]]
    assert drawn.top > 2.0
