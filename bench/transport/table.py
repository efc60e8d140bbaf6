"""The transport benchmark's result on a terminal: a table for each lane of each placement, readable at 80 columns."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from specd import units
from specd.bench.machine import gpu_names
from specd.bench.transport.result import Auto, Slowdown, TransportResult, TransportRow

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

COLUMNS = {
    "size": 15, "p50": 7, "p99": 7, "GB/s": 5, "raw": 5, "×": 4, "stream": 6, "raw ": 5, "× ": 4, "CPU s/GB": 9, "": 1,
}  # fmt: skip
"""Widths: a line has 79 characters, with a space between columns."""
LEGEND = (
    "p50, p99: announcement → usable tensor, one transfer at a time. stream: back to back, announced ahead. GB: 10⁹ "
    "bytes, one way. raw: a plain copy of the same size and kind in turn with the transfers; ×: of its speed. "
    "CPU s/GB: trainer + daemon. D2H hop: the daemon's copy to the host, before READY. "
    "✓: the right bytes, all of the first slot's compared, up to 64 MiB of each other's."
)


def render(result: TransportResult) -> Iterator[RenderableType]:
    """What to print, in order."""
    from rich.text import Text

    facts = result.machine
    yield Text(_machine(result), style="bold")
    for auto in result.auto:
        rows = [row for row in result.rows if row.placement == auto.placement]
        if rows:
            yield from _rows(auto, rows)
        yield Text(_taken(auto), style="italic")
        if slowdowns := [found for found in result.slowdowns if found.placement == auto.placement]:
            yield from _slowdowns(slowdowns)
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


def size(row: TransportRow) -> str:
    """The shape a row stands for (`5 taps 3,072`, `3+final 3,072`: of so many tokens), or else its size."""
    short = row.shape.replace(" taps + ", "+").removesuffix(" tokens").replace(", ", " ", 1)
    return short or units.size(row.size_bytes)


def _rows(auto: Auto, rows: Sequence[TransportRow]) -> Iterator[RenderableType]:
    """A heading, then for each lane what it is next to and a table; columns are as wide in all of them."""
    from rich.text import Text

    yield Text(f"\n{auto.placement}: daemon on {auto.daemon}, trainer on {auto.trainer}", style="bold")
    for index, (lane, found) in enumerate(_grouped(rows)):
        first = found[0]
        raw = f"next to {first.raw_kind}" if first.raw_kind else "no copy at all"
        yield Text.assemble((f"\n{lane}", "bold"), (f", {raw}; attach {first.setup_ms:.0f} ms", "dim"))
        table = _table(COLUMNS, show_header=index == 0)
        for row in found:
            table.add_row(
                size(row),
                duration(row.p50_us),
                duration(row.p99_us),
                rate(row.gb_per_s),
                rate(row.raw_gb_per_s),
                ratio(row.ratio),
                rate(row.stream_gb_per_s),
                rate(row.raw_stream_gb_per_s),
                ratio(row.stream_ratio),
                _cpu(row),
                "[green]✓[/]" if row.verified else "[red]✗[/]",
            )
        hops = [row for row in found if row.d2h_gb_per_s is not None]
        if hops:
            table.add_row("[dim]D2H hop[/dim]")
        for row in hops:
            cells = (rate(row.d2h_gb_per_s), rate(row.d2h_raw_gb_per_s), ratio(row.d2h_ratio))
            table.add_row(size(row), "", "", *cells)
        yield table
        if wrong := [size(row) for row in found if not row.verified]:
            yield Text(f"WRONG bytes arrived: {', '.join(wrong)}", style="bold red")


def _slowdowns(slowdowns: Sequence[Slowdown]) -> Iterator[RenderableType]:
    from rich.text import Text

    yield Text("\nbeside a matmul (bfloat16, 8192³), TFLOP/s")
    table = _table({"on the GPU of": 28, "alone": 6, "during": 6, "slowdown": 8, "spread alone": 12, "GB/s": 5})
    for found in slowdowns:
        table.add_row(
            f"{found.transport}, {units.size(found.size_bytes)}: {found.side}",
            f"{found.alone_tflop_per_s:.0f}",
            f"{found.during_tflop_per_s:.0f}",
            f"{found.slowdown:.1%}",
            f"{found.alone_spread:.1%}",
            rate(found.gb_per_s),
        )
    yield table


def _table(columns: Mapping[str, int], show_header: bool = True) -> Table:
    """A table of columns with these widths; all but the first hold figures."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), show_header=show_header)
    for index, (head, width) in enumerate(columns.items()):
        table.add_column(head.strip(), justify="right" if index else "left", width=width, no_wrap=True)
    return table


def _grouped(rows: Iterable[TransportRow]) -> Iterator[tuple[str, list[TransportRow]]]:
    for lane, found in itertools.groupby(rows, key=lambda row: row.lane):
        yield lane, list(found)


def _cpu(row: TransportRow) -> str:
    if row.trainer_cpu_s_per_gb is None or row.daemon_cpu_s_per_gb is None:
        return "–"
    sides = (row.trainer_cpu_s_per_gb, row.daemon_cpu_s_per_gb)
    return "+".join(f"{side:.1f}" if side >= 1 else f"{side:.3f}".lstrip("0") for side in sides)


def _taken(auto: Auto) -> str:
    lines = [f"auto takes {auto.name or 'nothing'}"]
    tried = {name: reason for name, reason in auto.reasons.items() if not reason.startswith("not tried")}
    lines += [f"  not {name}: {reason}" for name, reason in tried.items()]
    behind = [name for name in auto.reasons if name not in tried]
    if behind:
        lines.append(f"  not {', '.join(behind)}: after {auto.name} in auto's order")
    return "\n".join(lines)


def _machine(result: TransportResult) -> str:
    facts, gpus = result.machine, gpu_names(result.machine)
    versions = [f"torch {facts['torch']}"]
    versions += [f"{name} {facts[name]}" for name in ("driver", "cuda", "nccl", "cupy") if gpus and facts[name]]
    return f"{gpus or 'no GPU'} · {facts['cpu']}, {facts['cores']} cores · {', '.join(versions)}"
