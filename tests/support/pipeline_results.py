"""Made-up rows and results of the pipeline benchmark."""

from __future__ import annotations

from typing import Any

from bench_results import MACHINE
from specd.bench.pipeline.result import Mode, PipelineResult, PipelineRow, Rate
from specd.bench.pipeline.settings import Lengths


def row(mode: Mode, depth: int, iteration_ms: float, lengths: Lengths = "fixed", **changes: Any) -> PipelineRow:
    """A row of one sample a batch, on two devices unless co-located; a daemon's waits are a quarter of an iteration."""
    known: dict[str, Any] = {"devices": 1 if mode == "co-located" else 2, "transport": "shm", "parallel": 1}
    known |= {f"p{share}_ms": iteration_ms for share in (10, 25, 50, 75, 90)}
    if mode != "origin":
        known |= {"trainer_ms": iteration_ms / 2, "wire_wait_ms": iteration_ms / 4, "target_wait_ms": iteration_ms / 4}
    known |= changes
    samples_per_s = known["parallel"] / iteration_ms * 1e3
    return PipelineRow(
        mode=mode,
        lengths=lengths,
        depth=depth,
        iterations=6,
        iteration_ms=iteration_ms,
        samples_per_s=samples_per_s,
        tokens_per_s=64 * samples_per_s,
        gpu_seconds_per_sample=known["devices"] / samples_per_s,
        bytes_per_sample=2e6,
        **known,
    )


def both_lengths() -> PipelineResult:
    """A whole run on the CPU, of two distributions of lengths."""
    memory: dict[str, Any] = {"daemon_memory_bytes": 2_000_000_000, "trainer_memory_bytes": 1_000_000_000}
    rows = [
        row("disaggregated", 0, 40.0, bound_ms=15.0, efficiency=0.375, over_origin=1.1, **memory),
        row("disaggregated", 2, 16.0, bound_ms=15.0, efficiency=0.938, over_origin=1.6, **memory),
        row("origin", 0, 44.0, transport="gloo"),
        row("origin", 1, 26.0, transport="gloo"),
        row("co-located", 0, 25.0, transport="inproc", over_origin=1.04, trainer_memory_bytes=3_000_000_000),
        row("co-located data-parallel", 0, 30.0, transport="inproc", parallel=2, over_origin=1.73),
        row("disaggregated", 0, 50.0, "log-normal", bound_ms=20.0, efficiency=0.4),
    ]
    rates = [
        rate("the ring", "16×512", 2, 1, "bare target", 0.99, 0.95),
        rate("the ring", "1×3072", 4, 2, "bare target, 2 a forward (the best)", 1.0, 0.95),
        rate("one by one", "1×512", 32, 16, "daemon, 16×512", 0.9, 0.8),
    ]
    return PipelineResult(
        machine=MACHINE | {"gpus": []},
        settings={},
        target={"model": "synthetic", "layers": 8, "hidden_size": 32, "vocabulary": 64, "dtype": "float32"},
        wall_s=12.3,
        target_ms={"fixed": {1: 11.2, 2: 9.0}},
        target_spread_ms={"fixed": {1: (11.0, 11.5)}},
        draft_ms={"fixed": 15.0},
        rows=tuple(rows),
        rates=tuple(rates),
        work=None,
        skipped={"disaggregated over nixl": "nixl is missing: pip install 'specd-daemon[nixl]'"},
    )


def rate(name: str, composition: str, depth: int, merged: int, reference: str, ratio: float, bar: float) -> Rate:
    return Rate(
        name=name, composition=composition, depth=depth, merged=merged, tokens_per_s=88_920.0,
        p25_tokens_per_s=88_000.0, p75_tokens_per_s=89_000.0, reference=reference,
        reference_tokens_per_s=88_920.0 / ratio, ratio=ratio, bar=bar,
    )  # fmt: skip
