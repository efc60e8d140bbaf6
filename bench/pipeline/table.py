"""The pipeline benchmark's result as tables for a terminal, readable at 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from specd.bench.pipeline.result import PipelineResult, PipelineRow, Rate
from specd.bench.pipeline.settings import Lengths

if TYPE_CHECKING:
    from rich.console import RenderableType

TIMES = ("mode", "depth", "over", "ms", "bound", "eff.", "samples/s", "GPU·s", "× origin")
WAITS = ("mode", "depth", "over", "devices", "target wait", "wire wait", "trains", "MB")
RATES = ("batches", "depth", "a forward", "tokens/s", "next to", "tokens/s", "ratio", "bar")
RATIOS = ("mode", "depth", "over", "devices", "samples/s", "× one", "× as many")
WORDS = ("mode", "over", "batches", "next to")
WRAPPED = "next to"
"""The one column that may take several lines: no figure is cut at 80 columns."""
LEGEND = (
    "ms: mean iteration, as are its waits; × W: it trains W batches, one of each rank · "
    "bound: max(W · target / daemons, draft), or their sum on one device · "
    "eff.: bound over measured · GPU·s, MB: of a sample; devices × seconds, and bytes sent · "
    "× origin: samples/s over `origin`, the protocol of SpecForge's pull request 569, at depth 0 without overlap, else "
    "at its best · × one, × as many: samples/s over those of one co-located device, and of as many that train "
    "together, each with its own target · memory: in use at the end on all GPUs of a side, beyond what was in use "
    "before. "
    "On a CPU a process counts as a device, and its memory is its peak resident size."
)


def render(result: PipelineResult) -> list[RenderableType]:
    """Three tables for each length distribution, the rates beside the bare target, and what was not measured."""
    from rich.text import Text

    parts: list[RenderableType] = []
    for lengths in dict.fromkeys(row.lengths for row in result.rows):
        rows = [row for row in result.rows if row.lengths == lengths]
        parts.append(_alone(result, rows[0].lengths))
        parts.append(_table(TIMES, [_times(row) for row in rows]))
        parts.append(_table(WAITS, [_waits(row) for row in rows]))
        if any(row.over_one for row in rows):
            parts.append(_table(RATIOS, [_ratios(row) for row in rows]))
    if result.rates:
        parts.append("a daemon's tokens/s to a null trainer; a forward: most batches that share one")
        parts.append(_table(RATES, [_rate(rate) for rate in result.rates]))
    # Text, because a reason may hold what looks like markup: pip install 'specd-daemon[nixl]'.
    parts += [Text(f"not measured: {what}: {why}") for what, why in result.skipped.items()]
    daemons = max((row.daemon_memory_bytes or 0 for row in result.rows), default=0)
    apart = max((row.trainer_memory_bytes or 0 for row in result.rows if row.mode == "disaggregated"), default=0)
    together = max((row.trainer_memory_bytes or 0 for row in result.rows if row.mode == "co-located"), default=0)
    parts.append(
        f"memory: daemons {daemons / 1e9:.2f} GB, trainer {apart / 1e9:.2f} GB, co-located {together / 1e9:.2f} GB · "
        f"{result.wall_s:.0f} s"
    )
    return [*parts, LEGEND]


def label(row: PipelineRow) -> str:
    """What tables and charts call a row's mode."""
    return f"{row.mode.removesuffix(' data-parallel')} × {row.parallel}" if row.parallel > 1 else row.mode


def _alone(result: PipelineResult, lengths: Lengths) -> str:
    """What target and draft take for a batch when nothing else runs."""
    times = [f"{ms:.2f} ({size} a forward)" for size, ms in result.target_ms.get(lengths, {}).items()]
    draft = _number(result.draft_ms.get(lengths), ".2f")
    return f"{lengths} lengths, ms a batch: target {' or '.join(times) or '?'}, draft {draft}"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, justify="left" if head in WORDS else "right", no_wrap=head != WRAPPED)
    for line in lines:
        table.add_row(*line)
    return table


def _times(row: PipelineRow) -> tuple[str, ...]:
    return (
        label(row),
        str(row.depth),
        row.transport,
        f"{row.iteration_ms:.2f}",
        _number(row.bound_ms, ".2f"),
        _number(row.efficiency, ".3f"),
        f"{row.samples_per_s:.1f}",
        f"{row.gpu_seconds_per_sample:.4f}",
        _number(row.over_origin, ".2f"),
    )


def _waits(row: PipelineRow) -> tuple[str, ...]:
    return (
        label(row),
        str(row.depth),
        row.transport,
        str(row.devices),
        _number(row.target_wait_ms, ".2f"),
        _number(row.wire_wait_ms, ".2f"),
        _number(row.trainer_ms, ".2f"),
        f"{row.bytes_per_sample / 1e6:.2f}",
    )


def _ratios(row: PipelineRow) -> tuple[str, ...]:
    return (
        label(row),
        str(row.depth),
        row.transport,
        str(row.devices),
        f"{row.samples_per_s:.1f}",
        _number(row.over_one, ".2f"),
        _number(row.over_as_many, ".2f"),
    )


def _rate(rate: Rate) -> tuple[str, ...]:
    return (
        rate.composition,
        str(rate.depth),
        f"≤ {rate.merged}" if rate.merged > 1 else "1",
        f"{rate.tokens_per_s:,.0f}",
        rate.reference,
        f"{rate.reference_tokens_per_s:,.0f}",
        f"{rate.ratio:.3f}",
        f"≥ {rate.bar:g}",
    )


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
