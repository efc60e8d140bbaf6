"""A target without a daemon: its forwards with the same capture and nothing around them, the ceiling of all rows."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import torch

from specd.bench.pipeline_work import Lengths, Settings, batches, short_batches
from specd.capture import CaptureSpec
from specd.packing import Batch, slot_layout
from specd.targets.base import Completion, Fill, Target

AHEAD = 1
"""Forwards that are launched while one runs, as a daemon does it."""
NONCE = 1_000_000


class Bare(msgspec.Struct, frozen=True, kw_only=True):
    """What a bare target takes. batch_ms: by lengths and by batches in a forward, for one batch. short, long: tokens/s
    of `many` short samples in a forward, and of one sample as long as a batch."""

    batch_ms: dict[str, dict[int, float]]
    short_tokens_per_s: float
    long_tokens_per_s: float


def measure(target: Target, spec: CaptureSpec, settings: Settings) -> Bare:
    """Run every composition that a row or a rate is compared with."""
    vocab, count = target.contract.vocab_size, settings.steps
    groups = sorted({settings.merged(depth) for depth in settings.depths})

    def one(lengths: Lengths, size: int) -> float:
        forwards = max(4, -(-count // size))
        drawn = batches(settings, lengths, vocab, (forwards + settings.warmup) * size, NONCE)
        return run(target, spec, grouped(drawn, size), settings.warmup) / size * 1e3

    short = short_batches(settings, vocab, settings.many, count + settings.warmup, NONCE)
    whole = msgspec.structs.replace(settings, sample_tokens=settings.batch_tokens)
    long = batches(whole, "fixed", vocab, count + settings.warmup, NONCE)
    return Bare(
        batch_ms={lengths: {size: round(one(lengths, size), 3) for size in groups} for lengths in settings.lengths},
        short_tokens_per_s=short[0].num_tokens / run(target, spec, grouped(short, 1), settings.warmup),
        long_tokens_per_s=long[0].num_tokens / run(target, spec, grouped(long, 1), settings.warmup),
    )


def run(target: Target, spec: CaptureSpec, groups: Sequence[Sequence[Batch]], warmup: int) -> float:
    """Seconds of a forward over a group of batches, launched back to back; the first `warmup` are not timed."""
    hidden = target.contract.hidden_size
    nbytes = [
        max(slot_layout(spec, hidden, group[place].num_tokens).nbytes for group in groups)
        for place in range(len(groups[0]))
    ]
    rings = [[slot(size, target.device) for size in nbytes] for _ in range(AHEAD + 1)]
    running: deque[Completion | None] = deque()
    begin = 0.0
    for count, group in enumerate(groups):
        if count == warmup:
            drain(running, 0)
            begin = time.perf_counter()
        running.append(target.run([fill(batch, spec, hidden, place) for batch, place in zip(group, rings[count % 2],
                                                                                            strict=True)]))  # fmt: skip
        drain(running, AHEAD)
    drain(running, 0)
    return (time.perf_counter() - begin) / (len(groups) - warmup)


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


def drain(running: deque[Completion | None], left: int) -> None:
    """Wait until at most `left` forwards run."""
    while len(running) > left:
        if (completion := running.popleft()) is not None:
            completion.wait()
