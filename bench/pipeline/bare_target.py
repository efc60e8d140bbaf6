"""A target without a daemon: its forwards with the same capture and nothing else, the ceiling of all rows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from specd.bench.pipeline.settings import Settings, batches, short_batches
from specd.protocol.batch import Batch, slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob, Completion, Target

AHEAD = 1
"""Forwards that are launched while one runs, as in a daemon."""
NONCE = 1_000_000


class Bare(msgspec.Struct, frozen=True, kw_only=True):
    """Times of a bare target, each by how many batches share a forward.

    batch_ms: by lengths, for one batch; batch_spread_ms: 25th and 75th percentile of the same. short, long: tokens/s of
    batches of `many` short samples, and of batches that are one sample.
    """

    batch_ms: dict[str, dict[int, float]]
    batch_spread_ms: dict[str, dict[int, tuple[float, float]]]
    short_tokens_per_s: dict[int, float]
    long_tokens_per_s: dict[int, float]


def measure(target: Target, spec: CaptureSpec, settings: Settings) -> Bare:
    """Time every composition that a row or a rate is compared with."""
    vocab, steps = target.contract.vocab_size, settings.steps

    def timed(drawn: Sequence[Batch], size: int) -> _Timed:
        return _timed(target, spec, grouped(settings, drawn, size))

    times: dict[str, dict[int, _Timed]] = {}
    for lengths in settings.lengths:
        drawn = batches(settings, lengths, vocab, steps, NONCE, settings.warmup)  # as long as those that rows time
        waiting = {settings.under_way(depth, size) for depth in settings.depths for size in (1, settings.trainers)}
        sizes = {1, *(settings.merged(depth, lengths) for depth in waiting)}
        times[lengths] = {size: timed(drawn, size) for size in sorted(sizes)}

    def rates(drawn: Sequence[Batch]) -> dict[int, float]:
        tokens = drawn[0].num_tokens
        return {size: round(tokens / timed(drawn, size).mean_s, 1) for size in sorted({1, settings.room(tokens)})}

    whole = msgspec.structs.replace(settings, sample_tokens=settings.batch_tokens)
    return Bare(
        batch_ms={
            lengths: {size: round(found.mean_s * 1e3, 3) for size, found in by_size.items()}
            for lengths, by_size in times.items()
        },
        batch_spread_ms={
            lengths: {size: found.quartiles_ms for size, found in by_size.items()} for lengths, by_size in times.items()
        },
        short_tokens_per_s=rates(short_batches(settings, vocab, settings.many, steps, NONCE)),
        long_tokens_per_s=rates(batches(whole, "fixed", vocab, steps, NONCE)),
    )


class _Timed(NamedTuple):
    """Seconds for one batch: the mean of all, and the quartiles over forwards in ms."""

    mean_s: float
    quartiles_ms: tuple[float, float]


def _timed(target: Target, spec: CaptureSpec, groups: Sequence[Sequence[Batch]]) -> _Timed:
    # Kernels are compiled by shape: what is timed has been run before.
    seconds = run(target, spec, [*groups, *groups], len(groups))
    each = [took / len(group) * 1e3 for took, group in zip(seconds, groups, strict=True)]
    low, high = np.percentile(each, (25, 75)).tolist()
    return _Timed(sum(seconds) / sum(map(len, groups)), (round(low, 3), round(high, 3)))


def run(target: Target, spec: CaptureSpec, groups: Sequence[Sequence[Batch]], warmup: int) -> list[float]:
    """Seconds of each forward over a group of batches, launched back to back; the first `warmup` are not timed."""
    hidden = target.contract.hidden_size
    nbytes = [
        max(slot_layout(spec, hidden, batch.num_tokens).nbytes for batch in place if batch is not None)
        for place in zip_longest(*groups)
    ]
    rings = [[slot(size, target.device) for size in nbytes] for _ in range(AHEAD + 1)]
    running: deque[Completion | None] = deque()
    ends: list[float] = []
    for count, group in enumerate(groups):
        if count == warmup:
            drain(running, 0, ends)
            ends = [time.perf_counter()]
        places = zip(group, rings[count % len(rings)], strict=False)  # a group may be smaller than the largest
        running.append(target.run([fill(batch, spec, hidden, place) for batch, place in places]))
        drain(running, AHEAD, ends)
    drain(running, 0, ends)
    return [end - begin for begin, end in pairwise(ends)]


def fill(batch: Batch, spec: CaptureSpec, hidden: int, place: Any) -> CaptureJob:
    """A worker's job for its target: capture one batch into `place`."""
    layout = slot_layout(spec, hidden, batch.num_tokens)
    return CaptureJob(tokens=batch.tokens, lengths=batch.lengths, spec=spec, layout=layout, slot=place)


def slot(nbytes: int, device: str) -> Any:
    """Memory for one batch on the target's device, as a job takes it."""
    memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return memory if memory.is_cuda else memoryview(memory.numpy())  # type: ignore[arg-type]


def grouped(settings: Settings, drawn: Sequence[Batch], most: int) -> list[Sequence[Batch]]:
    """Neighbours that share a forward when up to `most` of them wait; all of `drawn` over and over, `most` times.

    So the last forward is no smaller than the others where batches are of one size, and none is left out where not.
    """
    repeated = [*drawn] * most
    return [repeated[part] for part in settings.forwards([batch.num_tokens for batch in repeated], most)]


def drain(running: deque[Completion | None], left: int, ends: list[float]) -> None:
    """Wait until at most `left` forwards run, and note when each one ended."""
    while len(running) > left:
        if (completion := running.popleft()) is not None:
            completion.wait()
        ends.append(time.perf_counter())
