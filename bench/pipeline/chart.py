"""The pipeline benchmark's result as a picture: where a batch's time goes, what a sample costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from specd.bench import charts
from specd.bench.machine import gpu_names
from specd.bench.pipeline.result import PipelineResult, PipelineRow
from specd.bench.pipeline.table import label
from specd.report.style import GREY, INK, SILVER, TARGET, TRAINER, WIRE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS: Final = (("trainer computes", TRAINER), ("waits for wire", WIRE), ("waits for target", TARGET))
WHOLE: Final = ("not split", SILVER)
"""Of a row without a subscriber, which has no waits to report."""
WIDTH, BAR, GAP = 12.0, 0.38, 0.75
"""Inches: of the picture, of a bar, and of title and scale of one distribution of lengths."""
ENDS: Final = 8.5
"""Points of the figures at the ends of bars."""


def write(result: PipelineResult, path: Path) -> None:
    """Write the chart of a result. Raises ConfigError for a path that `charts.check` refuses."""
    lengths = dict.fromkeys(row.lengths for row in result.rows)
    parts = {name: [row for row in result.rows if row.lengths == name] for name in lengths}

    def draw(figure: Figure) -> None:
        where = f"{gpu_names(result.machine) or result.machine['cpu']} · {result.target['model']}"
        figure.suptitle(where, fontsize=9, fontweight="normal", color=GREY, x=0.01, ha="left")
        if not parts:
            figure.text(0.5, 0.5, "nothing was measured", ha="center", color=GREY)
            return
        grid = figure.subplots(len(parts), 2, squeeze=False, height_ratios=[len(rows) for rows in parts.values()])
        for (left, right), (name, rows) in zip(grid, parts.items(), strict=True):
            left.set_title(f"{name} lengths: ms a batch")
            times(left, rows)
            right.set_title("device-seconds a sample")
            costs(right, rows)
        _legend(figure, result.rows)

    charts.write(path, draw, WIDTH, 1.2 + GAP * len(parts) + BAR * len(result.rows))


def times(axes: Axes, rows: Sequence[PipelineRow]) -> None:
    """Stacked bars of an iteration's parts over the batches that it trains, and a mark at the bound."""
    for place, row in enumerate(rows):
        shares = [(row.iteration_ms, WHOLE[1])]
        if row.trainer_ms is not None:
            waits = (row.trainer_ms, row.wire_wait_ms or 0.0, row.target_wait_ms or 0.0)
            shares = [(ms, colour) for ms, (_, colour) in zip(waits, PARTS, strict=True)]
        left = 0.0
        for ms, colour in shares:
            axes.barh(place, ms / row.parallel, left=left, color=colour, height=0.7, zorder=2)
            left += ms / row.parallel
        bound = (row.bound_ms or 0.0) / row.parallel
        axes.text(max(left, bound), place, f" {row.iteration_ms / row.parallel:.1f}", va="center", fontsize=ENDS)
        if bound:
            axes.plot([bound] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.6, zorder=3)
    _frame(axes, rows, room=0.15)


def costs(axes: Axes, rows: Sequence[PipelineRow]) -> None:
    """Bars of what a sample costs, and how many times faster than `origin` it is trained."""
    for place, row in enumerate(rows):
        cost = row.gpu_seconds_per_sample
        axes.barh(place, cost, color=WHOLE[1], height=0.7, zorder=2)
        faster = f" · {row.over_origin:.2f} × origin" if row.over_origin else ""
        axes.text(cost, place, f" {cost:.4f}{faster}", va="center", fontsize=ENDS)
    _frame(axes, rows, room=0.5)
    axes.tick_params(axis="y", length=0, labelleft=False)


def _legend(figure: Figure, rows: Sequence[PipelineRow]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = [Patch(color=colour, label=name) for name, colour in (*PARTS, WHOLE)]
    if any(row.bound_ms is not None for row in rows):
        handles.append(Line2D([], [], color=INK, marker="|", linestyle="", markersize=11, markeredgewidth=1.6,
                              label="bound"))  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)


def _frame(axes: Axes, rows: Sequence[PipelineRow], room: float) -> None:
    """Names, scale and grid. room: for the figures at the ends, as a share of the longest bar."""
    axes.set_yticks(range(len(rows)), [f"{label(row)}, {row.transport}, depth {row.depth}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=6)
    axes.margins(x=room)
    axes.set_xlim(left=0)
    axes.grid(axis="x")
