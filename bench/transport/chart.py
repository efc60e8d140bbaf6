"""The transport benchmark's result as a picture: GB/s and latency over size, one column a placement."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from specd.bench import charts
from specd.bench.machine import gpu_names
from specd.bench.transport.lanes import DevicePair
from specd.bench.transport.result import Auto, TransportResult, TransportRow
from specd.report.style import BLUE, GREEN, GREY, INK, PURPLE, RED, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A marker each beside the colour: told apart in print without colours.
LOOKS: Final = {
    "cuda_ipc": (BLUE, "o"),
    "cuda_ipc borrow": (SKY, "v"),
    "nccl": (RED, "s"),
    "nixl": (PURPLE, "P"),
    "shm": (GREEN, "^"),
    "bytes": ("#B8860B", "D"),
    "inproc": ("#4B5563", "X"),
}
SPARE: Final = (("#7C3AED", "p"), ("#9D174D", "h"), ("#475569", "*"))
"""For plug-ins."""
PANEL_WIDTH, PANEL_HEIGHT = 5.4, 3.4
DASHES: Final = (0, (4, 2))
TICKS: Final = ((1 << 12, "4 KiB"), (1 << 16, "64 KiB"), (1 << 20, "1 MiB"), (1 << 24, "16 MiB"), (1 << 28, "256 MiB"))
CAPTION: Final = (
    "Dashed: a raw copy of the same size and kind, made in turn with the transfers. "
    "Hollow markers: real batches (5 taps; 3 taps + final)."
)

Value = Callable[[TransportRow], float | None]


def write(result: TransportResult, path: Path) -> None:
    """Write the chart of a result. Raises ConfigError for a path that `charts.check` refuses."""
    shown = [auto for auto in result.auto if any(row.placement == auto.placement for row in result.rows)]
    width = PANEL_WIDTH * max(1, len(shown))

    def draw(figure: Figure) -> None:
        if shown:
            _panels(figure, result, shown)
        else:
            figure.text(0.5, 0.5, "nothing was measured", ha="center", color=GREY)
        heading = textwrap.fill(_machine(result), int(15 * width))
        figure.suptitle(heading, fontsize=9, fontweight="normal", color=GREY, x=0.01, ha="left")
        figure.supxlabel(textwrap.fill(CAPTION, int(16 * width)), fontsize=8.5, color=GREY, x=0.01, ha="left")

    charts.write(path, draw, width, 2 * PANEL_HEIGHT + 0.9)


def look(lane: str, rows: Sequence[TransportRow]) -> tuple[str, str]:
    """Colour and marker of a lane among these rows."""
    others = [name for name in _lanes(rows) if name not in LOOKS]
    return LOOKS.get(lane) or SPARE[others.index(lane) % len(SPARE)]


def _panels(figure: Figure, result: TransportResult, shown: Sequence[Auto]) -> None:
    grid = figure.subplots(2, len(shown), squeeze=False, sharex="col")
    for column, auto in enumerate(shown):
        rows = [row for row in result.rows if row.placement == auto.placement]
        above, below = grid[0][column], grid[1][column]
        above.set_title(
            f"{DevicePair(auto.placement, auto.daemon, auto.trainer).title} · auto: {auto.name or 'nothing'}"
        )
        _curves(above, rows, lambda row: row.stream_gb_per_s or row.gb_per_s)
        _ceilings(above, rows, lambda row: row.raw_stream_gb_per_s or row.raw_gb_per_s)
        above.set_ylabel("streamed, GB/s")
        _curves(below, rows, lambda row: row.p50_us, lambda row: row.p99_us)
        _ceilings(below, rows, lambda row: row.raw_p50_us)
        below.set_ylabel("READY → usable, p50 to p99")
        below.set_xlabel("size of a transfer")
        _scales(above, lambda value: f"{value:,.10g}")
        _scales(below, _tick_us)
        _legend(above, rows)


def _curves(
    axes: Axes, rows: Sequence[TransportRow], value: Value, high: Callable[[TransportRow], float] | None = None
) -> None:
    """One line a lane, with markers: real shapes hollow, wrong bytes crossed. `high` shades up to a second value."""
    for lane in _lanes(rows):
        colour, marker = look(lane, rows)
        known = _known(rows, lane, value)
        sizes, values = [row.size_bytes for row in known], [value(row) or 0.0 for row in known]
        axes.plot(sizes, values, color=colour, linewidth=1.8, zorder=3)
        for fill, chosen in ((colour, False), ("white", True)):
            points = [(row.size_bytes, value(row) or 0.0) for row in known if bool(row.shape) is chosen]
            axes.plot(
                [x for x, _ in points], [y for _, y in points], marker, color=colour, markerfacecolor=fill,
                markersize=5.5 if chosen else 4.5, markeredgewidth=1.2, zorder=5 if chosen else 4,
            )  # fmt: skip
        wrong = [(row.size_bytes, value(row) or 0.0) for row in known if not row.verified]
        axes.plot([x for x, _ in wrong], [y for _, y in wrong], "x", color=INK, markersize=9, zorder=6)
        if high is not None:
            axes.fill_between(sizes, values, [high(row) for row in known], color=colour, alpha=0.13, linewidth=0)


def _ceilings(axes: Axes, rows: Sequence[TransportRow], value: Value) -> None:
    """The raw copies, thin and dashed, in the colour of the lane they are the ceiling of."""
    for lane in _lanes(rows):
        known = _known(rows, lane, value)
        axes.plot(
            [row.size_bytes for row in known],
            [value(row) or 0.0 for row in known],
            color=look(lane, rows)[0],
            linewidth=0.9,
            linestyle=DASHES,
            alpha=0.8,
            zorder=2,
        )


def _legend(axes: Axes, rows: Sequence[TransportRow]) -> None:
    """Lanes by their best rate, the raw copies, and wrong bytes if there are any."""
    from matplotlib.lines import Line2D

    def best(lane: str) -> float:
        return max(row.stream_gb_per_s or row.gb_per_s or 0.0 for row in rows if row.lane == lane)

    handles = []
    for lane in sorted(_lanes(rows), key=best, reverse=True):
        colour, marker = look(lane, rows)
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=lane))
    handles.append(Line2D([], [], color=GREY, linewidth=0.9, linestyle=DASHES, label="raw copy"))
    if not all(row.verified for row in rows):
        handles.append(Line2D([], [], color=INK, marker="x", linestyle="", markersize=9, label="WRONG bytes"))
    axes.legend(handles=handles, loc="best", handlelength=2.2, labelspacing=0.35)


def _scales(axes: Axes, tick: Callable[[float], str]) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    ticks = [(at, name) for at, name in (*TICKS, (1 << 30, "1 GiB")) if low <= at <= high]
    axes.xaxis.set_major_locator(FixedLocator([at for at, _ in ticks]))
    axes.xaxis.set_major_formatter(FixedFormatter([name for _, name in ticks]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid()


def _tick_us(us: float) -> str:
    return f"{us:g} µs" if us < 1e3 else f"{us / 1e3:g} ms" if us < 1e6 else f"{us / 1e6:g} s"


def _lanes(rows: Sequence[TransportRow]) -> list[str]:
    return list(dict.fromkeys(row.lane for row in rows))


def _known(rows: Sequence[TransportRow], lane: str, value: Value) -> list[TransportRow]:
    """Those of a lane that have this value, by size."""
    return sorted((row for row in rows if row.lane == lane and value(row)), key=lambda row: row.size_bytes)


def _machine(result: TransportResult) -> str:
    facts = result.machine
    parts = [gpu_names(facts), facts["cpu"]]
    parts += [f"{name} {facts[name]}" for name in ("driver", "nccl", "torch") if facts.get(name)]
    parts.append(f"commit {facts['commit'][:12]}" if facts.get("commit") else "")
    return " · ".join(part for part in parts if part)
