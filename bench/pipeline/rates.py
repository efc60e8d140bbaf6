"""A daemon's throughput to a null trainer, which takes batches and does nothing, next to a bare target's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final

import msgspec
import numpy as np

from specd.bench.pipeline.bare_target import Bare
from specd.bench.pipeline.result import Rate
from specd.bench.pipeline.settings import Settings, batches, short_batches
from specd.bench.pipeline.step import clock
from specd.client.subscriber import Subscriber
from specd.protocol.batch import Batch

RING_BAR: Final = 0.95
MERGING_BAR: Final = 0.8
FORWARDS: Final = 24
"""Full forwards of merged samples that the merging rate is timed over: less than one at each end is a partial one."""
BLOCKS: Final = 8
"""Blocks of timed deliveries, at most: their rates show the spread."""


class Fed(msgspec.Struct, frozen=True, kw_only=True):
    """One throughput. merged: the most batches that share a forward. spread: 25th and 75th percentile over blocks."""

    composition: str
    depth: int
    merged: int
    tokens_per_s: float
    spread: tuple[float, float]


def measure(
    settings: Settings,
    subscriber: Callable[[int], AbstractContextManager[Subscriber]],
    vocab: int,
    nonce: Callable[[], int],
    progress: Callable[[str], None],
) -> dict[str, Fed]:
    """Run every composition. subscriber: of one daemon, by depth. nonce: a new one each time.

    A daemon works ahead only as far as it has requests: `short` and `long` have a depth at which it never waits for the
    trainer. It may merge then, and `compare` allows the bare target the same.
    """
    whole = msgspec.structs.replace(settings, sample_tokens=settings.batch_tokens)
    short, long, single = settings.many * settings.short, settings.batch_tokens, settings.short

    def one(composition: str, tokens: int, depth: int, count: int, draw: Callable[[int], list[Batch]]) -> Fed:
        progress(f"{composition} to a null trainer at depth {depth}")
        merged = min(depth, settings.room(tokens))
        warmup = max(settings.warmup, depth + 1)
        with subscriber(depth) as link:
            # The last batches find an emptier queue, as no requests follow: they are not timed.
            seconds = clock(link.stream(draw(warmup + count + depth + 1)), None, warmup, steps=count).seconds
        rates = [tokens * len(block) / sum(block) for block in _blocks(seconds, merged)]
        low, high = np.percentile(rates, (25, 75)).tolist()
        rate = tokens * len(seconds) / sum(seconds)
        return Fed(composition=composition, depth=depth, merged=merged, tokens_per_s=rate, spread=(low, high))

    return {
        "short": one(
            f"{settings.many}×{settings.short}", short, settings.fed(short), settings.steps,
            lambda count: short_batches(settings, vocab, settings.many, count, nonce()),
        ),
        "long": one(
            f"1×{settings.batch_tokens}", long, settings.fed(long), settings.steps,
            lambda count: batches(whole, "fixed", vocab, count, nonce()),
        ),
        "singles": one(
            f"1×{settings.short}", single, settings.merge_depth, settings.many * FORWARDS,
            lambda count: short_batches(settings, vocab, 1, count, nonce()),
        ),
    }  # fmt: skip


def compare(settings: Settings, fed: dict[str, Fed], bare: Bare) -> Iterator[Rate]:
    """Every rate next to the best one of the bare target, among the merges that the daemon may have made."""
    for key, beside in (("short", bare.short_tokens_per_s), ("long", bare.long_tokens_per_s)):
        allowed = {size: rate for size, rate in beside.items() if size <= fed[key].merged}
        best = max(allowed, key=lambda size: allowed[size])
        name = "bare target" if len(allowed) == 1 else f"bare target, {best} a forward (the best)"
        yield _rate("the ring", fed[key], name, allowed[best], RING_BAR, allowed)
    if not settings.target.get("exact"):  # a target that runs every batch alone merges nothing
        short = fed["short"]
        yield _rate("one by one", fed["singles"], f"daemon, {short.composition}", short.tokens_per_s, MERGING_BAR, {})


def _rate(name: str, found: Fed, reference: str, beside: float, bar: float, bare: dict[int, float]) -> Rate:
    return Rate(
        name=name,
        composition=found.composition,
        depth=found.depth,
        merged=found.merged,
        tokens_per_s=round(found.tokens_per_s, 1),
        p25_tokens_per_s=round(found.spread[0], 1),
        p75_tokens_per_s=round(found.spread[1], 1),
        reference=reference,
        reference_tokens_per_s=round(beside, 1),
        bare_tokens_per_s=bare,
        ratio=round(found.tokens_per_s / beside, 4),
        bar=bar,
    )


def _blocks(seconds: Sequence[float], merged: int) -> Iterator[Sequence[float]]:
    """Blocks of equal size, of whole forwards: the batches of one forward are delivered at once."""
    size = max(1, -(-len(seconds) // BLOCKS // merged)) * merged
    for at in range(0, len(seconds), size):
        if at == 0 or at + size <= len(seconds):
            yield seconds[at : at + size]
