"""The pictures of a report: loss, teacher-forced accuracy, acceptance by offset, time of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from specd import units
from specd.report.style import BLUE, GREEN, GREY, ORANGE, RED, SMALL, TARGET, TRAINER, WIRE, render
from specd.train.journal import StepRecord
from specd.train.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 5.2, 3.1
"""Inches: small, so that letters keep their size on a phone."""
SMOOTH = 0.05
"""Width of the running mean, as a share of the run."""


def svg(draw: Callable[[Axes], None]) -> str:
    """The picture that `draw` makes on fresh axes. Raises ConfigError where matplotlib is missing."""
    return render(lambda figure: draw(figure.subplots()), WIDTH, HEIGHT, "svg").decode()


def loss(axes: Axes, records: Sequence[StepRecord], held_out: Sequence[Measurement] = ()) -> None:
    """Draw the loss of every step, its running mean, and that of held-out rows wherever it was measured."""
    points = [(record.step, record.loss) for record in records if record.loss is not None]
    steps, values = [step for step, _ in points], [value for _, value in points]
    axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.8)
    axes.plot(steps, running_mean(values), color=BLUE, linewidth=1.8)
    if known := [(one.step, one.loss) for one in held_out if one.loss is not None]:
        axes.plot(*zip(*known, strict=True), "o-", color=ORANGE, linewidth=1.4, markersize=4, label="held-out rows")
        axes.legend(loc="upper right")
    # A fresh draft's first losses would flatten all the rest.
    top = 1.2 * _usual(values)
    if values and values[0] > 1.5 * top:
        axes.set_ylim(0, top)
        _beyond(axes, f"{values[0]:.1f} at step {steps[0]}", 0.98)
    axes.set_ylabel("loss (nats)")
    _steps(axes, records)


def accuracy(axes: Axes, records: Sequence[StepRecord]) -> None:
    """Draw the teacher-forced accuracy of the first offset, of the last, and of all together."""
    last = max((len(record.teacher_forced_by_offset) for record in records), default=0)
    series: list[tuple[str, str, list[tuple[int, float | None]]]] = [
        ("all offsets", BLUE, [(record.step, record.teacher_forced_accuracy) for record in records])
    ]
    for colour, offset in ((GREEN, 1), (ORANGE, last)):
        if last > 1:
            values = [(record.step, _at(record.teacher_forced_by_offset, offset)) for record in records]
            series.append((f"offset {offset}", colour, values))
    ends: list[tuple[float, str, str]] = []
    for name, colour, values in series:
        known = [(step, value) for step, value in values if value is not None]
        means = [100 * value for value in running_mean([value for _, value in known])]
        axes.plot([step for step, _ in known], means, color=colour, linewidth=1.8)
        if known:
            ends.append((means[-1], name, colour))
    axes.set_ylim(bottom=0)
    _labels(axes, ends)
    axes.set_ylabel("teacher-forced accuracy (%)")
    _steps(axes, records)


def acceptance(axes: Axes, runs: Mapping[str, Sequence[float]]) -> None:
    """Draw the share of proposals whose first k tokens the target accepted; one line per named evaluation."""
    longest = max(len(shares) for shares in runs.values())
    for (name, shares), colour in zip(runs.items(), (GREY, RED, BLUE, GREEN), strict=False):
        offsets, percent = range(1, len(shares) + 1), [100 * share for share in shares]
        axes.plot(offsets, percent, "o-", color=colour, linewidth=1.6, markersize=4, label=name)
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlim(0.6, longest + 0.4)
    top = max(5.0, *(110 * share for shares in runs.values() for share in shares))
    axes.set_ylim(-0.03 * top, top)
    axes.set_xlabel("offset k (guesses in a row)")
    axes.set_ylabel("accepted up to guess k (%)")
    axes.grid(axis="y")
    axes.legend(loc="upper right")


def time_split(axes: Axes, records: Sequence[StepRecord]) -> None:
    """Draw the time of a step, stacked by what the trainer waited for or did; in ms where steps take under a second."""
    names = (
        ("trainer computes", "train_s", TRAINER),
        ("waits for wire", "wire_wait_s", WIRE),
        ("waits for target", "target_wait_s", TARGET),
    )
    steps = [record.step for record in records]
    raw = [[getattr(record, field) for record in records] for _, field, _ in names]
    means = [running_mean(values) for values in raw]
    totals = [sum(parts) for parts in zip(*means, strict=True)]
    top, usual = max(totals, default=1.0), _usual(totals)
    if top > 1.5 * usual > 0:  # one step that compiles would flatten all the rest
        slowest, step = max((sum(parts), step) for *parts, step in zip(*raw, steps, strict=True))
        top = usual
        _beyond(axes, f"{units.duration(slowest)} at step {step}", 0.88)
    scale, unit = (1e3, "ms") if top < 1 else (1.0, "s")
    axes.stackplot(
        steps,
        [[scale * value for value in values] for values in means],
        colors=[colour for _, _, colour in names],
        labels=[name for name, _, _ in names],
        alpha=0.85,
    )
    axes.set_ylim(0, 1.3 * scale * (top or 1.0))
    axes.set_ylabel(f"time ({unit} per step)")
    _steps(axes, records)
    axes.legend(loc="upper center", ncols=3, handlelength=1.0, columnspacing=1.2)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours on both sides, over SMOOTH of the run in all; the ends use what they have."""
    half = max(0, round(len(values) * SMOOTH / 2))
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


def _usual(values: Sequence[float]) -> float:
    """95th percentile of `values`; 1 of none."""
    return sorted(values)[max(0, int(0.95 * len(values)) - 1)] if values else 1.0


def _beyond(axes: Axes, text: str, height: float) -> None:
    """Say what lies above a capped axis."""
    axes.annotate(text, (0.16, height), xycoords="axes fraction", va="top", fontsize=SMALL)


def _at(values: Sequence[float | None], offset: int) -> float | None:
    return values[offset - 1] if offset <= len(values) else None


def _steps(axes: Axes, records: Sequence[StepRecord]) -> None:
    axes.set_xlabel("optimizer step")
    if records:
        axes.set_xlim(records[0].step, max(records[-1].step, records[0].step + 1))
    axes.grid(axis="y")


def _labels(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name lines at their right ends, in their colours, pushed apart where they would overlap."""
    gap = 0.06 * axes.get_ylim()[1]
    below = -gap
    for y, name, colour in sorted(ends):
        below = max(y, below + gap)
        axes.annotate(
            name,
            (1, below),
            (4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=SMALL,
            annotation_clip=False,
        )
