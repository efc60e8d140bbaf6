"""The pipeline benchmark's result as a picture: where a batch's time goes, what a sample costs; PNG or HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specd.bench.pipeline.result import Result, Row
from specd.bench.pipeline.table import LEGEND, label
from specd.bench.transport.chart import GREY, GRID, STYLE, check
from specd.report.page import document

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINS, WIRE, TARGET, WHOLE = "#0072B2", "#E69F00", "#D55E00", "#9CA3AF"
"""Okabe and Ito's blue, orange and vermilion; grey where a row has no waits to tell."""
BAR, GAP = 0.34, 1.6


def write(result: Result, path: Path) -> None:
    """Write the chart of a result. Raises ConfigError for a path that `chart.check` refuses."""
    check(path)
    if path.suffix == ".png":
        path.write_bytes(_drawn(result, "png"))
        return
    svg = _drawn(result, "svg").decode()
    facts = ", ".join(gpu["name"] for gpu in result.machine["gpus"]) or result.machine["cpu"]
    body = f"<h1>specd pipeline</h1><p>{facts} · {result.target['model']}</p>{svg[svg.index('<svg') :]}<p>{LEGEND}</p>"
    path.write_text(
        document("specd pipeline", body, "svg { width: 100%; height: auto; }", width_px=1152), encoding="utf-8"
    )


def _drawn(result: Result, kind: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lengths = list(dict.fromkeys(row.lengths for row in result.rows))
    most = max(sum(row.lengths == one for row in result.rows) for one in lengths)
    with rc_context(STYLE):
        figure = Figure(figsize=(12, len(lengths) * (GAP + BAR * most)), layout="constrained")
        grid = figure.subplots(len(lengths), 2, squeeze=False)
        for (left, right), name in zip(grid, lengths, strict=True):
            rows = [row for row in result.rows if row.lengths == name]
            _times(left, rows)
            left.set_title(f"{name} lengths: ms a batch")
            _costs(right, rows)
            right.set_title("device-seconds a sample")
        handles = [Patch(color=TRAINS, label="trains"), Patch(color=WIRE, label="waits for the wire")]
        handles += [Patch(color=TARGET, label="waits for the target"), Patch(color=WHOLE, label="all of it")]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
        out = io.BytesIO()
        figure.savefig(out, format=kind, dpi=150, facecolor="white", metadata={"Date": None} if kind == "svg" else {})
    return out.getvalue()


def _times(axes: Axes, rows: Sequence[Row]) -> None:
    """Stacked bars of an iteration's shares over the batches that it trains, and a mark at the bound."""
    for place, row in enumerate(rows):
        shares = [(row.trainer_ms, TRAINS), (row.wire_wait_ms, WIRE), (row.target_wait_ms, TARGET)]
        if row.trainer_ms is None:
            shares = [(row.iteration_ms, WHOLE)]
        left = 0.0
        for share, colour in shares:
            width = (share or 0.0) / row.parallel
            axes.barh(place, width, left=left, color=colour, height=0.7, zorder=2)
            left += width
        axes.text(left, place, f" {row.iteration_ms / row.parallel:.1f}", va="center", fontsize=8.5)
        if row.bound_ms is not None:
            axes.plot([row.bound_ms] * 2, [place - 0.42, place + 0.42], color="black", linewidth=1.4, zorder=3)
    _frame(axes, rows)
    axes.set_xlabel("black mark: the bound", color=GREY)


def _costs(axes: Axes, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        axes.barh(place, row.gpu_seconds_per_sample, color=WHOLE, height=0.7, zorder=2)
        faster = f" · {row.over_seed:.2f} × seed" if row.over_seed else ""
        axes.text(
            row.gpu_seconds_per_sample, place, f" {row.gpu_seconds_per_sample:.4f}{faster}", va="center", fontsize=8.5
        )
    _frame(axes, rows, room=0.5)
    axes.set_yticklabels([])


def _frame(axes: Axes, rows: Sequence[Row], room: float = 0.28) -> None:
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.margins(x=room)
    axes.set_xlim(left=0)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _label(row: Row) -> str:
    return f"{label(row)}, {row.transport}, depth {row.depth}"
