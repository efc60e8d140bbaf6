"""The transport benchmark's result as a picture: GB/s and latency over size, one column a placement; PNG or HTML."""

from __future__ import annotations

import html
import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from specd.bench.transport.result import Auto, Result, Row
from specd.bench.transport.table import LEGEND, duration, rate, ratio, size
from specd.errors import ConfigError, missing_extra
from specd.report.page import document

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, and a marker each: told apart with any colour vision, and in print without colours.
LOOKS: Final = {
    "cuda_ipc": ("#0072B2", "o"),
    "cuda_ipc borrow": ("#56B4E9", "v"),
    "nccl": ("#D55E00", "s"),
    "nixl": ("#CC79A7", "P"),
    "shm": ("#009E73", "^"),
    "bytes": ("#B8860B", "D"),
    "inproc": ("#4B5563", "X"),
}
SPARE: Final = (("#7C3AED", "p"), ("#9D174D", "h"), ("#475569", "*"))
"""For plug-ins."""
INK, GREY, GRID = "#1F2937", "#6B7280", "#E5E7EB"
STYLE: Final[Any] = {
    "font.size": 9.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "text.color": INK,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "svg.hashsalt": "specd",
}
FORMATS: Final = (".png", ".html")
PANEL_WIDTH, PANEL_HEIGHT = 5.6, 3.5
TICKS: Final = ((1 << 12, "4 KiB"), (1 << 16, "64 KiB"), (1 << 20, "1 MiB"), (1 << 24, "16 MiB"), (1 << 28, "256 MiB"))


def check(path: Path) -> None:
    """Raise ConfigError unless a chart can be written to `path`: before minutes are spent on measuring it."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"chart {str(path)!r}: expected a file that ends in {' or '.join(FORMATS)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"chart {str(path)!r}: its directory does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise missing_extra("matplotlib", "report") from None


def write(result: Result, path: Path) -> None:
    """Write the chart of a result: a picture, or a page without outside resources that has the figures, too.

    Raises ConfigError for a path `check` refuses.
    """
    check(path)
    if path.suffix == ".png":
        path.write_bytes(_drawn(result, "png"))
    else:
        path.write_text(page(result), encoding="utf-8")


def page(result: Result) -> str:
    """The result as HTML."""
    svg = _drawn(result, "svg").decode()
    picture = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{_text(_title(result))}" ', 1)
    body = [
        f"<h1>{_text(_title(result))}</h1><p>{_text(_subtitle(result))}</p>",
        "<ul>" + "".join(f"<li>{_text(_verdict(auto))}</li>" for auto in result.auto) + "</ul>",
        f"<figure>{picture}<figcaption>{_text(_caption())}</figcaption></figure>",
        *(_table(auto, [row for row in result.rows if row.placement == auto.placement]) for auto in result.auto),
        _slowdowns(result),
        _skipped(result),
        f"<p class='small'>{_text(LEGEND)}</p>",
        _facts(result),
    ]
    return document(_title(result), "\n".join(body), _STYLE, width_px=1280)


def _drawn(result: Result, kind: str) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = [auto for auto in result.auto if any(row.placement == auto.placement for row in result.rows)]
    with rc_context(STYLE):
        width = PANEL_WIDTH * max(1, len(shown))
        figure = Figure(figsize=(width, 2 * PANEL_HEIGHT + 0.9), layout="constrained")
        if shown:
            _panels(figure, result, shown)
        else:
            figure.text(0.5, 0.5, "nothing was measured", ha="center", color=GREY)
        if kind == "png":
            figure.suptitle(
                textwrap.fill(_subtitle(result), int(14 * width)), fontsize=9, color=GREY, x=0.01, ha="left"
            )
            figure.supxlabel(textwrap.fill(_caption(), int(15 * width)), fontsize=8.5, color=GREY, x=0.01, ha="left")
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(out, format=kind, dpi=160, metadata=metadata, facecolor="white")
    return out.getvalue()


def _panels(figure: Figure, result: Result, shown: Sequence[Auto]) -> None:
    grid = figure.subplots(2, len(shown), squeeze=False, sharex="col")
    for column, auto in enumerate(shown):
        rows = [row for row in result.rows if row.placement == auto.placement]
        above, below = grid[0][column], grid[1][column]
        above.set_title(_place(auto))
        _curves(above, rows, lambda row: row.stream_gb_per_s or row.gb_per_s)
        _ceilings(above, rows, lambda row: row.raw_stream_gb_per_s or row.raw_gb_per_s)
        above.set_ylabel("streamed, GB/s")
        _curves(below, rows, lambda row: row.p50_us, lambda row: row.p99_us)
        _ceilings(below, rows, lambda row: row.raw_p50_us)
        below.set_ylabel("READY → usable, p50 to p99")
        below.set_xlabel("size of a transfer")
        _axes(above, lambda value: f"{value:,.10g}")
        _axes(below, _tick_us)
        _names(above, rows)


def _curves(
    axes: Axes, rows: Sequence[Row], value: Callable[[Row], float | None], high: Callable[[Row], float] | None = None
) -> None:
    """One line a lane, with markers; real shapes are hollow. `high` shades up to a second value."""
    for lane in _lanes(rows):
        colour, marker = _look(lane, rows)
        known = sorted((row for row in rows if row.lane == lane and value(row)), key=lambda row: row.size_bytes)
        sizes, values = [row.size_bytes for row in known], [value(row) or 0.0 for row in known]
        axes.plot(sizes, values, color=colour, linewidth=1.8, zorder=3)
        for fill, chosen in ((colour, False), ("white", True)):
            points = [(row.size_bytes, value(row) or 0.0) for row in known if bool(row.shape) is chosen]
            axes.plot(
                [x for x, _ in points], [y for _, y in points], marker, color=colour, markerfacecolor=fill,
                markersize=5.5 if chosen else 4.5, markeredgewidth=1.2, zorder=5 if chosen else 4,
            )  # fmt: skip
        if high is not None:
            axes.fill_between(sizes, values, [high(row) for row in known], color=colour, alpha=0.13, linewidth=0)


def _ceilings(axes: Axes, rows: Sequence[Row], value: Callable[[Row], float | None]) -> None:
    """The raw copies, thin and dashed, in the colour of the lane they are the ceiling of."""
    for lane in _lanes(rows):
        known = sorted((row for row in rows if row.lane == lane and value(row)), key=lambda row: row.size_bytes)
        axes.plot(
            [row.size_bytes for row in known],
            [value(row) or 0.0 for row in known],
            color=_look(lane, rows)[0],
            linewidth=0.9,
            linestyle=(0, (4, 2)),
            alpha=0.8,
            zorder=2,
        )


def _names(axes: Axes, rows: Sequence[Row]) -> None:
    """The legend: lanes by their last value, the raw copies, real shapes."""
    from matplotlib.lines import Line2D

    last = {
        lane: [row.stream_gb_per_s or row.gb_per_s or 0.0 for row in rows if row.lane == lane] for lane in _lanes(rows)
    }
    handles = []
    for lane in sorted(last, key=lambda name: -max(last[name])):
        colour, marker = _look(lane, rows)
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=lane))
    handles.append(Line2D([], [], color=GREY, linewidth=0.9, linestyle=(0, (4, 2)), label="raw copy"))
    axes.legend(handles=handles, loc="best", fontsize=8.5, handlelength=2.2, labelspacing=0.35)


def _tick_us(us: float) -> str:
    return f"{us:g} µs" if us < 1e3 else f"{us / 1e3:g} ms" if us < 1e6 else f"{us / 1e6:g} s"


def _axes(axes: Axes, tick: Callable[[float], str]) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low, high = axes.get_xlim()
    ticks = [(at, name) for at, name in (*TICKS, (1 << 30, "1 GiB")) if low <= at <= high]
    axes.xaxis.set_major_locator(FixedLocator([at for at, _ in ticks]))
    axes.xaxis.set_major_formatter(FixedFormatter([name for _, name in ticks]))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=8.5)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def _lanes(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.lane for row in rows))


def _look(lane: str, rows: Sequence[Row]) -> tuple[str, str]:
    others = [name for name in _lanes(rows) if name not in LOOKS]
    return LOOKS.get(lane) or SPARE[others.index(lane) % len(SPARE)]


def _place(auto: Auto) -> str:
    if auto.placement == "cpu":
        return "Host memory to host memory"
    where = "on one GPU" if auto.placement == "same" else "to a peer GPU"
    return f"{auto.daemon} → {auto.trainer}, {where}"


def _title(result: Result) -> str:
    return "specd transports next to raw copies"


def _subtitle(result: Result) -> str:
    facts = result.machine
    names = [gpu["name"] for gpu in facts["gpus"]]
    parts = [", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)), facts["cpu"]]
    parts += [f"{name} {facts[name]}" for name in ("driver", "nccl", "torch") if facts.get(name)]
    parts.append(f"commit {facts['commit'][:12]}" if facts.get("commit") else "")
    return " · ".join(part for part in parts if part)


def _caption() -> str:
    return (
        "Dashed: a raw copy of the same size and kind, made in turn with the transfers. "
        "Hollow markers: real batches (DFlash-5, EAGLE-3)."
    )


def _verdict(auto: Auto) -> str:
    tried = [f"{name}: {why}" for name, why in auto.reasons.items() if not why.startswith("not tried")]
    return f"{_place(auto)}: auto takes {auto.name or 'nothing'}" + (f" ({'; '.join(tried)})" if tried else "")


def _table(auto: Auto, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    heads = (
        "lane",
        "size",
        "p50",
        "p99",
        "GB/s",
        "raw",
        "×",
        "streamed",
        "raw",
        "×",
        "D2H hop",
        "raw",
        "×",
        "verified",
    )
    lines = [
        (
            row.lane, size(row), duration(row.p50_us), duration(row.p99_us), rate(row.gb_per_s), rate(row.raw_gb_per_s),
            ratio(row.ratio), rate(row.stream_gb_per_s), rate(row.raw_stream_gb_per_s), ratio(row.stream_ratio),
            rate(row.d2h_gb_per_s), rate(row.d2h_raw_gb_per_s), ratio(row.d2h_ratio),
            "✓" if row.verified else "WRONG",
        )
        for row in rows
    ]  # fmt: skip
    return f"<h2>{_text(_place(auto))}</h2>{_grid(heads, lines)}"


def _slowdowns(result: Result) -> str:
    if not result.slowdowns:
        return ""
    heads = ("lane", "placement", "GPU of", "alone TFLOP/s", "during", "slowdown", "streamed GB/s")
    lines = [
        (
            found.transport, found.placement, found.side, f"{found.alone_tflop_per_s:.0f}",
            f"{found.during_tflop_per_s:.0f}", f"{found.slowdown:.1%}", rate(found.gb_per_s),
        )
        for found in result.slowdowns
    ]  # fmt: skip
    return f"<h2>A bfloat16 8192³ matmul beside a stream</h2>{_grid(heads, lines)}"


def _skipped(result: Result) -> str:
    if not result.skipped:
        return ""
    return f"<h2>Not measured</h2>{_grid(('what', 'why'), list(result.skipped.items()))}"


def _facts(result: Result) -> str:
    facts = result.machine | {"seconds": f"{result.wall_s:g} of {result.budget_s:g} allowed"}
    lines = [
        (name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)) for name, value in facts.items()
    ]
    return f"<h2>Machine</h2>{_grid(('fact', 'value'), lines)}"


def _grid(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(text)}</td>" for text in line) + "</tr>" for line in lines)
    return f"<div class='grid'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _text(value: str) -> str:
    return html.escape(value)


_STYLE: Final = """
h1 + p, figcaption, .small { color: #4b5563; }
h1 + p { margin: .4rem 0 0; }
h2 { margin-top: 2.25rem; }
ul { padding-left: 1.2rem; }
figure { margin: 1.5rem 0 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption, .small { font-size: .875rem; }
.grid { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .7rem .25rem 0; border-top: 1px solid #e5e7eb; white-space: nowrap; }
th { font-weight: 600; color: #4b5563; border-top: 0; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
td:last-child { white-space: normal; }
"""
