"""Rows of the pipeline benchmark: from the times of one, and with what follows from the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from specd.bench.pipeline.bare_target import Bare
from specd.bench.pipeline.result import Mode, PipelineRow
from specd.bench.pipeline.settings import Lengths, Settings
from specd.bench.pipeline.step import Clocked

COLOCATED: Final = ("co-located", "co-located data-parallel")


def row_of(
    mode: Mode,
    lengths: Lengths,
    depth: int,
    transport: str,
    devices: int,
    clocked: Clocked,
    parallel: int = 1,
) -> PipelineRow:
    """A row of these times; without a subscriber's statistics it has no waits."""
    figures = clocked.figures(parallel)
    waits: dict[str, Any] = {}
    stats = clocked.stats
    if stats.batches:
        iterations = len(clocked.seconds)
        target, wire = (waited / iterations * 1e3 for waited in (stats.target_wait_s, stats.wire_wait_s))
        waits = {
            "target_wait_ms": round(target, 3),
            "wire_wait_ms": round(wire, 3),
            "trainer_ms": round(max(0.0, figures["iteration_ms"] - target - wire), 3),
            "forward_ms": round(stats.forward_s / stats.batches * 1e3, 3),
        }
    return PipelineRow(
        mode=mode,
        lengths=lengths,
        depth=depth,
        transport=transport,
        devices=devices,
        gpu_seconds_per_sample=round(devices / figures["samples_per_s"], 6),
        bytes_per_sample=stats.nbytes / clocked.samples,
        **figures,
        **waits,
    )


def settle(
    rows: Sequence[PipelineRow], settings: Settings, bare: Bare | None, draft_ms: dict[Lengths, float]
) -> tuple[PipelineRow, ...]:
    """All rows with what follows from other figures: their bounds, and `origin` and co-location beside them."""
    return tuple(msgspec.structs.replace(row, **dict(_changes(row, rows, settings, bare, draft_ms))) for row in rows)


def _changes(
    row: PipelineRow, rows: Sequence[PipelineRow], settings: Settings, bare: Bare | None, draft_ms: dict[Lengths, float]
) -> Iterator[tuple[str, float]]:
    rivals = [other for other in rows if other.mode == "origin" and other.lengths == row.lengths]
    if row.mode == "disaggregated" and row.depth == 0:  # on demand, as `origin` without overlap
        rivals = [other for other in rivals if other.depth == 0]
    if rivals and row.mode != "origin":
        yield "over_origin", round(row.samples_per_s / max(other.samples_per_s for other in rivals), 3)
    together = [other for other in rows if other.lengths == row.lengths and other.mode in COLOCATED]
    for name, devices in (("over_one", 1), ("over_as_many", row.devices)):
        if best := max((other.samples_per_s for other in together if other.devices == devices), default=0.0):
            yield name, round(row.samples_per_s / best, 3)
    if row.mode == "disaggregated" and bare is not None:
        merged = settings.merged(settings.under_way(row.depth, row.parallel), row.lengths)
        target = min(ms for size, ms in bare.batch_ms[row.lengths].items() if size <= merged)
        draft = draft_ms[row.lengths]
        # On one device waiting costs nothing, and an overlap gains only what either leaves idle.
        bound = target + draft if settings.shared else max(target * row.parallel / len(settings.devices), draft)
        yield "bound_ms", round(bound, 3)
        yield "efficiency", round(bound / row.iteration_ms, 4)
