"""The result of `specd bench pipeline`: rows, rates beside the bare target, and what `specd plan` reads."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from specd.bench.pipeline.settings import Lengths
from specd.plan.balance import Work

Mode = Literal["disaggregated", "co-located", "co-located data-parallel", "origin"]


class PipelineRow(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run one pipeline.

    devices: how many it occupies. parallel: batches that every iteration trains, one of each rank. iteration_ms: mean
    of the timed iterations, each ended when the step before it is done, at depth 0 its own; p10_ms … p90_ms:
    percentiles of the same. bound_ms: of a pipeline its slower side, on one device the sum of both; efficiency: bound
    over measured. target_wait_ms, wire_wait_ms: what an iteration waited for the target, or for a batch that was READY;
    trainer_ms: the rest.
    forward_ms: the target's time for a batch, as it reports it. bytes_per_sample: of the states, or of everything that
    `origin` sends. *_memory_bytes: in use at the end on all devices of a side, beyond what was in use before; on the
    CPU the peak resident size of its processes; co-located, all of it is the trainer's. over_origin: samples per second
    over those of `origin` with the same lengths: at depth 0 without overlap, else at its best. over_one: over those of
    one co-located device at its best; over_as_many: over those of as many co-located devices, which train together.
    None: does not apply, or was not measured.
    """

    mode: Mode
    lengths: Lengths
    depth: int
    transport: str
    devices: int
    parallel: int = 1
    iterations: int
    iteration_ms: float
    p10_ms: float
    p25_ms: float
    p50_ms: float
    p75_ms: float
    p90_ms: float
    bound_ms: float | None = None
    efficiency: float | None = None
    target_wait_ms: float | None = None
    wire_wait_ms: float | None = None
    trainer_ms: float | None = None
    forward_ms: float | None = None
    samples_per_s: float
    tokens_per_s: float
    gpu_seconds_per_sample: float
    bytes_per_sample: float
    daemon_memory_bytes: int | None = None
    trainer_memory_bytes: int | None = None
    over_origin: float | None = None
    over_one: float | None = None
    over_as_many: float | None = None


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """The daemon's tokens a second to a trainer that does nothing, beside a reference of the same run.

    composition: `16×512` is a batch of 16 samples of 512 tokens. merged: the most batches that share a forward.
    p25_tokens_per_s, p75_tokens_per_s: of the rates of blocks of batches. reference: the better of what a bare target
    gives for the same batches, one or `merged` of them in a forward; `bare_tokens_per_s` has both, by that number.
    ratio: rate over reference. bar: what it should reach.
    """

    name: str
    composition: str
    depth: int
    merged: int
    tokens_per_s: float
    p25_tokens_per_s: float
    p75_tokens_per_s: float
    reference: str
    reference_tokens_per_s: float
    bare_tokens_per_s: dict[int, float] = {}
    ratio: float
    bar: float


class PipelineResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    target_ms: of a bare forward in a process of its own, by lengths and by how many batches share a forward, for one
    batch; target_spread_ms: 25th and 75th percentile of the same. draft_ms: of an optimizer step on states that are
    there, by lengths. work: what `specd plan --from` reads, None before there are rows. skipped: what could not
    be measured, with the reason. began_s: when each part began, in seconds after the start.
    """

    machine: dict[str, Any]
    settings: dict[str, Any]
    target: dict[str, Any]
    wall_s: float
    target_ms: dict[str, dict[int, float]]
    target_spread_ms: dict[str, dict[int, tuple[float, float]]]
    draft_ms: dict[Lengths, float]
    rows: tuple[PipelineRow, ...]
    rates: tuple[Rate, ...]
    work: Work | None
    skipped: dict[str, str]
    began_s: dict[str, float] = {}
