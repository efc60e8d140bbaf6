"""A target without a daemon: its forwards with the same capture and nothing around them, the ceiling of all rows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import mean
from typing import Any

import msgspec
import numpy as np
import torch

from specd.bench.pipeline_work import Settings, batches, short_batches
from specd.capture import CaptureSpec
from specd.packing import Batch, slot_layout
from specd.targets.base import Completion, Fill, Target

AHEAD = 1
"""Forwards that are launched while one runs, as a daemon does it."""
NONCE = 1_000_000


class Bare(msgspec.Struct, frozen=True, kw_only=True):
    """What a bare target takes, each by how many batches share a forward.

    batch_ms: by lengths, for one batch; batch_spread_ms: 25th and 75th percentile of the same. short, long: tokens/s of
    batches of `many` short samples, and of batches that are one sample.
    """

    batch_ms: dict[str, dict[int, float]]
    batch_spread_ms: dict[str, dict[int, tuple[float, float]]]
    short_tokens_per_s: dict[int, float]
    long_tokens_per_s: dict[int, float]


def measure(target: Target, spec: CaptureSpec, settings: Settings) -> Bare:
    """Run every composition that a row or a rate is compared with."""
    vocab = target.contract.vocab_size
    sizes = sorted({settings.merged(depth) for depth in settings.depths})
    times: dict[str, dict[int, list[float]]] = {
        lengths: {
            size: _run_all(target, spec, settings, size, partial(batches, settings, lengths, vocab, nonce=NONCE))
            for size in sizes
        }
        for lengths in settings.lengths
    }
    whole = msgspec.structs.replace(settings, sample_tokens=settings.batch_tokens)

    def rates(tokens: int, draw: Callable[[int], list[Batch]]) -> dict[int, float]:
        most = settings.room(tokens)
        return {
            size: round(tokens / mean(_run_all(target, spec, settings, size, draw)), 1) for size in sorted({1, most})
        }

    return Bare(
        batch_ms={
            lengths: {size: round(mean(found) * 1e3, 3) for size, found in by_size.items()}
            for lengths, by_size in times.items()
        },
        batch_spread_ms={
            lengths: {size: _quartiles(found) for size, found in by_size.items()} for lengths, by_size in times.items()
        },
        short_tokens_per_s=rates(
            settings.short * settings.many, partial(short_batches, settings, vocab, settings.many, nonce=NONCE)
        ),
        long_tokens_per_s=rates(settings.batch_tokens, partial(batches, whole, "fixed", vocab, nonce=NONCE)),
    )


def _run_all(
    target: Target, spec: CaptureSpec, settings: Settings, size: int, draw: Callable[[int], list[Batch]]
) -> list[float]:
    """Seconds for one batch in each forward of `size` batches."""
    forwards = max(4, -(-settings.steps // size))
    groups = grouped(draw((forwards + settings.warmup) * size), size)
    # Kernels are compiled by shape: what is timed has been run before.
    run(target, spec, groups[settings.warmup :], 0)
    return [seconds / size for seconds in run(target, spec, groups, settings.warmup)]


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(np.asarray(seconds) * 1e3, (25, 75)).tolist()
    return round(low, 3), round(high, 3)


def run(target: Target, spec: CaptureSpec, groups: Sequence[Sequence[Batch]], warmup: int) -> list[float]:
    """Seconds of each forward over a group of batches, launched back to back; the first `warmup` are not timed."""
    hidden = target.contract.hidden_size
    nbytes = [
        max(slot_layout(spec, hidden, group[place].num_tokens).nbytes for group in groups)
        for place in range(len(groups[0]))
    ]
    rings = [[slot(size, target.device) for size in nbytes] for _ in range(AHEAD + 1)]
    running: deque[Completion | None] = deque()
    ends: list[float] = []
    for count, group in enumerate(groups):
        if count == warmup:
            drain(running, 0, ends)
            ends = [time.perf_counter()]
        running.append(target.run([fill(batch, spec, hidden, place) for batch, place in zip(group, rings[count % 2],
                                                                                            strict=True)]))  # fmt: skip
        drain(running, AHEAD, ends)
    drain(running, 0, ends)
    return [end - begin for begin, end in pairwise(ends)]


def fill(batch: Batch, spec: CaptureSpec, hidden: int, place: Any) -> Fill:
    """What a worker asks of its target for one batch."""
    layout = slot_layout(spec, hidden, batch.num_tokens)
    return Fill(tokens=batch.tokens, lengths=batch.lengths, spec=spec, layout=layout, slot=place)


def slot(nbytes: int, device: str) -> Any:
    """Memory for one batch where the target computes, as a Fill wants it."""
    memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
    return memory if memory.is_cuda else memoryview(memory.numpy())  # type: ignore[arg-type]


def grouped(drawn: Sequence[Batch], size: int) -> list[Sequence[Batch]]:
    """Neighbours that share a forward."""
    return [drawn[at : at + size] for at in range(0, len(drawn), size)]


def drain(running: deque[Completion | None], left: int, ends: list[float]) -> None:
    """Wait until at most `left` forwards run, and note when each one ended."""
    while len(running) > left:
        if (completion := running.popleft()) is not None:
            completion.wait()
        ends.append(time.perf_counter())
