"""The pipeline benchmark's result as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from specd.bench.pipeline.result import Rate, Result, Row

if TYPE_CHECKING:
    from rich.console import RenderableType

TIMES = ("mode", "depth", "over", "ms", "bound", "eff.", "samples/s", "GPU·s each", "× seed")
WAITS = ("mode", "depth", "over", "devices", "target wait", "wire wait", "trains", "MB each")
RATES = ("what", "batches", "depth", "a forward", "tokens/s", "beside", "tokens/s", "ratio", "bar")
WORDS = ("mode", "over", "what", "batches", "beside")
LEGEND = (
    "ms: mean iteration, as are its waits · bound: max(target / daemons, draft), or their sum on one device · "
    "eff.: bound over measured · GPU·s each: devices × seconds a sample · "
    "× seed: samples/s over the seed's protocol, at depth 0 without overlap, else at its best · "
    "memory: in use at the end on all GPUs of a side, beyond what was before. "
    "On a CPU a process counts as a device, and its memory is the most it had resident."
)


def render(result: Result) -> list[RenderableType]:
    """Two tables for each length distribution, the rates beside the bare target, and what was not measured."""
    parts: list[RenderableType] = []
    for lengths in dict.fromkeys(row.lengths for row in result.rows):
        rows = [row for row in result.rows if row.lengths == lengths]
        times = result.target_ms.get(lengths, {})
        alone = ", ".join(f"{ms:.2f} ms with {size} in a forward" for size, ms in times.items())
        parts.append(
            f"{lengths} lengths: a batch takes the target {alone or '?'}; the draft "
            f"{_number(result.draft_ms.get(lengths), '.2f')} ms"
        )
        parts.append(_table(TIMES, [_times(row) for row in rows]))
        parts.append(_table(WAITS, [_waits(row) for row in rows]))
    if result.rates:
        parts.append("a daemon's tokens a second to a null trainer, and most batches that share one of its forwards")
        parts.append(_table(RATES, [_rate(rate) for rate in result.rates]))
    parts += [f"not measured: {what}: {why}" for what, why in result.skipped.items()]
    held = max((row.daemon_memory_bytes or 0 for row in result.rows), default=0)
    apart = max((row.trainer_memory_bytes or 0 for row in result.rows if row.mode == "disaggregated"), default=0)
    together = max((row.trainer_memory_bytes or 0 for row in result.rows if row.mode == "co-located"), default=0)
    parts.append(
        f"memory: daemons {held / 1e9:.2f} GB, trainer {apart / 1e9:.2f} GB, co-located {together / 1e9:.2f} GB · "
        f"{result.wall_s:.0f} s"
    )
    return [*parts, LEGEND]


def label(row: Row) -> str:
    """How tables and charts call a row's mode."""
    return f"co-located × {row.parallel}" if row.mode == "co-located data-parallel" else row.mode


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, justify="left" if head in WORDS else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _times(row: Row) -> tuple[str, ...]:
    return (
        label(row),
        str(row.depth),
        row.transport,
        f"{row.iteration_ms:.2f}",
        _number(row.bound_ms, ".2f"),
        _number(row.efficiency, ".3f"),
        f"{row.samples_per_s:.1f}",
        f"{row.gpu_seconds_per_sample:.4f}",
        _number(row.over_seed, ".2f"),
    )


def _waits(row: Row) -> tuple[str, ...]:
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


def _rate(rate: Rate) -> tuple[str, ...]:
    return (
        rate.name,
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
