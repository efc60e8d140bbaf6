"""The transport benchmark's result on a terminal: one table a placement, readable at 120 columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from specd import units
from specd.bench.transport.result import Auto, Result, Row, Slowdown

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

LEGEND = (
    "p50, p99: announcement → usable tensor, one transfer at a time. streamed: back to back, announced ahead. GB: 10⁹ "
    "bytes, one way. raw: a plain copy of the same size and kind in turn with the transfers; ×: of its speed. "
    "CPU s/GB: trainer + daemon. ✓: the right bytes, all of the first slot's compared, up to 64 MiB of each other's."
)


def render(result: Result) -> Iterator[RenderableType]:
    """What to print, in order."""
    from rich.text import Text

    facts = result.machine
    yield Text(_machine(result), style="bold")
    for auto in result.auto:
        rows = [row for row in result.rows if row.placement == auto.placement]
        if rows:
            yield _rows(auto, rows)
        yield Text(_taken(auto), style="italic")
        if slowdowns := [found for found in result.slowdowns if found.placement == auto.placement]:
            yield _slowdowns(slowdowns)
    if result.skipped:
        yield Text("not measured:")
        reasons: dict[str, list[str]] = {}
        for title, reason in result.skipped.items():
            reasons.setdefault(reason, []).append(title)
        for reason, titles in reasons.items():
            yield Text(f"  {'; '.join(titles)}: {reason}")
    yield Text(f"{LEGEND} {result.wall_s:.0f} s; commit {facts['commit'] or 'unknown'}.", style="dim")


def duration(us: float | None) -> str:
    """`46 µs`, `2.31 ms`, `–`."""
    return "–" if us is None else units.duration(us / 1e6)


def rate(value: float | None) -> str:
    """Three figures of a GB/s."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """Two decimals, `–` for none."""
    return "–" if value is None else f"{value:.2f}"


def size(row: Row) -> str:
    """The shape a row stands for, or else its size."""
    return row.shape.removesuffix(" tokens") or units.size(row.size_bytes)


def _rows(auto: Auto, rows: Sequence[Row]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=f"\n{auto.placement}: daemon on {auto.daemon}, trainer on {auto.trainer}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    table.add_column("size", no_wrap=True)
    for column in ("p50", "p99", "GB/s", "raw", "×", "streamed", "raw", "×", "CPU s/GB", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for lane, found in _grouped(rows):
        first = found[0]
        table.add_row(f"[bold]{lane}[/bold]", "[dim]attach[/dim]", f"[dim]{first.setup_ms:.0f} ms[/dim]")
        table.add_row(f"[dim]{f'next to {first.raw_kind}' if first.raw_kind else 'no copy at all'}[/dim]")
        for row in found:
            table.add_row(
                f"  {size(row)}",
                duration(row.p50_us),
                duration(row.p99_us),
                rate(row.gb_per_s),
                rate(row.raw_gb_per_s),
                ratio(row.ratio),
                rate(row.stream_gb_per_s),
                rate(row.raw_stream_gb_per_s),
                ratio(row.stream_ratio),
                _cpu(row),
                "[green]✓[/]" if row.verified else "[red]WRONG[/]",
            )
        hops = [row for row in found if row.d2h_gb_per_s is not None]
        if hops:
            table.add_row("[dim]before READY: D2H[/dim]")
        for row in hops:
            cells = (rate(row.d2h_gb_per_s), rate(row.d2h_raw_gb_per_s), ratio(row.d2h_ratio))
            table.add_row(f"  {size(row)}", "", "", *cells)
        table.add_section()
    return table


def _slowdowns(slowdowns: Sequence[Slowdown]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("beside a matmul (bfloat16, 8192³)")
    for column in ("alone TFLOP/s", "during", "slowdown", "spread alone", "streamed GB/s"):
        table.add_column(column, justify="right")
    for found in slowdowns:
        table.add_row(
            f"{found.transport}, {units.size(found.size_bytes)}, on the {found.side}'s GPU",
            f"{found.alone_tflop_per_s:.0f}",
            f"{found.during_tflop_per_s:.0f}",
            f"{found.slowdown:.1%}",
            f"{found.alone_spread:.1%}",
            rate(found.gb_per_s),
        )
    return table


def _grouped(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    for lane, found in itertools.groupby(rows, key=lambda row: row.lane):
        yield lane, list(found)


def _cpu(row: Row) -> str:
    if row.trainer_cpu_s_per_gb is None or row.daemon_cpu_s_per_gb is None:
        return "–"
    return f"{row.trainer_cpu_s_per_gb:.3g}+{row.daemon_cpu_s_per_gb:.3g}"


def _taken(auto: Auto) -> str:
    lines = [f"auto takes {auto.name or 'nothing'}"]
    tried = {name: reason for name, reason in auto.reasons.items() if not reason.startswith("not tried")}
    lines += [f"  not {name}: {reason}" for name, reason in tried.items()]
    behind = [name for name in auto.reasons if name not in tried]
    if behind:
        lines.append(f"  not {', '.join(behind)}: after {auto.name} in auto's order")
    return "\n".join(lines)


def _machine(result: Result) -> str:
    facts = result.machine
    names = [gpu["name"] for gpu in facts["gpus"]]
    gpus = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))
    versions = [f"torch {facts['torch']}"]
    versions += [f"{name} {facts[name]}" for name in ("driver", "cuda", "nccl", "cupy") if gpus and facts[name]]
    return f"{gpus or 'no GPU'} · {facts['cpu']}, {facts['cores']} cores · {', '.join(versions)}"
