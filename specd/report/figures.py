"""The charts of a report: loss, teacher-forced accuracy, acceptance by offset, time of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from specd import units
from specd.evaluate.intervals import Interval
from specd.report.chart import Chart, Series
from specd.report.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, TARGET, TRAINER, WIRE
from specd.train.journal import StepRecord
from specd.train.measurement import Measurement

SMOOTH = 0.05
"""Width of the running mean, as a share of the run."""
MOST = 300
"""Points of a chart: longer runs show several steps as one point."""
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, GREY, INK)
"""Of the runs of a comparison."""

Runs = Mapping[str, Sequence[StepRecord]]


def loss(records: Sequence[StepRecord], held_out: Sequence[Measurement] = ()) -> Chart:
    """The loss of every step, its running mean, and that of held-out rows wherever it was measured."""
    axis, values = _Axis(len(records)), [record.loss for record in records]
    every = axis.spread(values)
    means = [_mean(point) for point in every]
    said = [
        "–" if not point else f"{point[0]:.4f}" if len(point) == 1 else f"{min(point):.4f} to {max(point):.4f}"
        for point in every
    ]
    several = axis.size > 1
    measured = {one.step: one.loss for one in held_out}
    apart = axis.means([measured.get(record.step) for record in records])
    held = [Series(name="held-out rows", colour=ORANGE, y=apart, dots=True)] if measured else []
    top, note = _usual_top(values)
    return axis.chart(
        [
            Series(
                name="each step",
                colour=BLUE,
                y=means,
                low=[min(point, default=None) for point in every] if several else (),
                high=[max(point, default=None) for point in every] if several else (),
                faint=True,
                said=said,
            ),
            Series(name="running mean", colour=BLUE, y=axis.means(_smooth(values))),
            *held,
        ],
        y_label="loss (nats)",
        top=top,
        note=note,
        value="{:.4f}".format,
    )


def accuracy(records: Sequence[StepRecord]) -> Chart:
    """The teacher-forced accuracy of the first offset, of the last, and of all together, in percent."""
    axis = _Axis(len(records))
    last = max((len(record.teacher_forced_by_offset) for record in records), default=0)
    series = [_percent(axis, "all offsets", BLUE, [record.teacher_forced_accuracy for record in records])]
    for colour, offset in ((GREEN, 1), (ORANGE, last)):
        if last > 1:
            values = [_at(record.teacher_forced_by_offset, offset) for record in records]
            series.append(_percent(axis, f"offset {offset}", colour, values))
    return axis.chart(series, y_label="teacher-forced accuracy (%)", value="{:.1f} %".format)


def acceptance(shares: Mapping[str, Sequence[float]], intervals: Mapping[str, Sequence[Interval]]) -> Chart:
    """The share of proposals whose first k tokens the target accepted; a line for each name.

    intervals: of those names that have some, low and high for each offset.
    """
    longest = max(len(values) for values in shares.values())
    offsets = list(range(1, longest + 1))
    series = []
    for (name, values), colour in zip(shares.items(), itertools.cycle(COLOURS)):
        gap: list[float | None] = [None] * (longest - len(values))
        ends = intervals.get(name, ())
        said = [f"{100 * value:.1f} %" for value in values]
        if ends:
            pairs = zip(said, ends, strict=True)
            said = [f"{text} ({100 * low:.1f} to {100 * high:.1f})" for text, (low, high) in pairs]
        series.append(
            Series(
                name=name,
                colour=colour,
                y=[*(100 * value for value in values), *gap],
                low=[*(100 * low for low, _ in ends), *gap] if ends else (),
                high=[*(100 * high for _, high in ends), *gap] if ends else (),
                dots=True,
                said=said + ["–"] * len(gap),
            )
        )
    best = max(
        5.0,
        *(value for one in series for values in (one.y, one.high) for value in values if value is not None),
    )
    return Chart(
        series=series,
        x=offsets,
        labels=[f"guess {offset}" for offset in offsets],
        ticks=offsets,
        x_label="offset k (guesses in a row)",
        y_label="accepted up to guess k (%)",
        top=1.08 * best,
    )


def time_split(records: Sequence[StepRecord]) -> Chart:
    """The time of a step, stacked by what the trainer waited for or did; in ms where steps take under a second."""
    names = (
        ("trainer computes", "train_s", TRAINER),
        ("waits for wire", "wire_wait_s", WIRE),
        ("waits for target", "target_wait_s", TARGET),
    )
    axis = _Axis(len(records))
    means = [running_mean([getattr(record, field) for record in records]) for _, field, _ in names]
    totals = [sum(parts) for parts in zip(*means, strict=True)]
    top, usual, note = max(totals, default=1.0), _usual(totals), ""
    if top > 1.5 * usual > 0:  # one step that compiles would flatten all the rest
        slowest, step = max((r.train_s + r.wire_wait_s + r.target_wait_s, r.step) for r in records)
        top, note = usual, f"{units.duration(slowest)} at step {step}"
    scale, unit = (1e3, "ms") if top < 1 else (1.0, "s")
    series = [
        Series(
            name=name,
            colour=colour,
            y=[None if value is None else scale * value for value in axis.means(values)],
            said=["–" if value is None else units.duration(value) for value in axis.means(values)],
        )
        for (name, _, colour), values in zip(names, means, strict=True)
    ]
    return axis.chart(
        series, y_label=f"time ({unit} per step)", top=1.2 * scale * (top or 1.0), note=note, stacked=True
    )


def compared(runs: Runs, value: Callable[[StepRecord], float | None], y_label: str, form: str) -> Chart:
    """The running mean of `value` of each step, a line for each run. form: of a value under the pointer."""
    axis = _Axis(max(len(records) for records in runs.values()))
    values = {name: [value(record) for record in records] for name, records in runs.items()}
    tops = [_usual_top(one)[0] or 1.05 * max((v for v in one if v is not None), default=0.0) for one in values.values()]
    series = [
        Series(name=name, colour=colour, y=axis.means(_smooth(one)))
        for (name, one), colour in zip(values.items(), itertools.cycle(COLOURS))
    ]
    return axis.chart(series, y_label=y_label, top=max(tops), value=form.format)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over the neighbours on both sides, over SMOOTH of the run in all; the ends use what they have."""
    half = max(0, round(len(values) * SMOOTH / 2))
    sums = [0.0, *itertools.accumulate(values)]
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


class _Axis:
    """The steps 1 to `steps` as at most MOST points of `size` steps each."""

    def __init__(self, steps: int) -> None:
        self.steps, self.size = steps, -(-steps // MOST)
        self.begins = range(0, steps, self.size)

    def spread(self, values: Sequence[float | None]) -> list[list[float]]:
        """The known values of each point; a shorter run has none in the last ones."""
        return [[v for v in values[begin : begin + self.size] if v is not None] for begin in self.begins]

    def means(self, values: Sequence[float | None]) -> list[float | None]:
        """The mean of each point's known values."""
        return [_mean(point) for point in self.spread(values)]

    def chart(
        self,
        series: Sequence[Series],
        *,
        y_label: str,
        top: float = 0.0,
        note: str = "",
        stacked: bool = False,
        value: Callable[[float], str] = "{:.3g}".format,
    ) -> Chart:
        """A chart over the steps."""
        ends = [min(begin + self.size, self.steps) for begin in self.begins]
        labels = [
            f"step {end:,}" if end == begin + 1 else f"steps {begin + 1:,} to {end:,}"
            for begin, end in zip(self.begins, ends, strict=True)
        ]
        middles = [(begin + 1 + end) / 2 for begin, end in zip(self.begins, ends, strict=True)]
        return Chart(
            series=series,
            x=middles,
            labels=labels,
            x_label="optimizer step",
            y_label=y_label,
            top=top,
            note=note,
            stacked=stacked,
            value=value,
        )


def _smooth(values: Sequence[float | None]) -> list[float | None]:
    """The running mean of the known values, each at its own place."""
    means = iter(running_mean([value for value in values if value is not None]))
    return [None if value is None else next(means) for value in values]


def _percent(axis: _Axis, name: str, colour: str, values: Sequence[float | None]) -> Series:
    smooth = [None if value is None else 100 * value for value in _smooth(values)]
    return Series(name=name, colour=colour, y=axis.means(smooth))


def _usual_top(values: Sequence[float | None]) -> tuple[float, str]:
    """Where the axis of a loss ends, and what lies beyond it; 0 and nothing where all fits.

    A fresh draft's first losses would flatten all the rest.
    """
    known = [(value, step) for step, value in enumerate(values, 1) if value is not None]
    top = 1.2 * _usual([value for value, _ in known])
    if known and known[0][0] > 1.5 * top:
        return top, f"{known[0][0]:.1f} at step {known[0][1]}"
    return 0.0, ""


def _usual(values: Sequence[float]) -> float:
    """95th percentile of `values`; 1 of none."""
    return sorted(values)[max(0, int(0.95 * len(values)) - 1)] if values else 1.0


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _at(values: Sequence[float | None], offset: int) -> float | None:
    return values[offset - 1] if offset <= len(values) else None
