"""Disaggregation: daemons and a trainer on devices of their own, over every transport, lengths and depth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from specd.bench.made_up import made_up
from specd.bench.pipeline.processes import daemon
from specd.bench.pipeline.settings import Lengths, Settings
from specd.bench.pipeline.step import Clocked, Draw, TrainingStep, clock, given
from specd.client.seats import Seat
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.errors import DaemonError
from specd.protocol.capture import CaptureSpec
from specd.train.distributed import Ranks

CONNECT_S: Final = 60.0
"""Longest wait for a daemon, and for one of its batches."""


@contextmanager
def daemons(settings: Settings, directory: Path) -> Iterator[tuple[str, ...]]:
    """One daemon a device, each with its socket in `directory`; yields their endpoints once all serve."""
    with ExitStack() as stack:
        yield tuple(
            stack.enter_context(
                daemon(settings.daemon(device, settings.slots, settings.trainers), directory / f"{index}.sock")
            )
            for index, device in enumerate(settings.devices)
        )


def subscribed(
    settings: Settings,
    endpoints: Sequence[str],
    transport: str,
    depth: int,
    device: str = "",
    ranks: Ranks = Ranks(),  # noqa: B008
) -> Subscriber:
    """A trainer's link to these daemons, of which each of several ranks takes its share."""
    link = SubscriberConfig(
        endpoints=tuple(endpoints), transport=transport, depth=depth, connect_s=CONNECT_S, timeout_s=CONNECT_S
    )
    return Subscriber(
        link,
        settings.capture,
        device=device or settings.trainer,
        name="bench",
        run=ranks.run,
        ranks=ranks.size,
        seat=Seat(ranks.rank, ranks.launch.local, ranks.launch.here),
    )


def warm_up(
    settings: Settings, subscriber: Subscriber, step: TrainingStep, draw: Draw, progress: Callable[[str], None]
) -> None:
    """Run target and draft over all lengths once: their kernels are compiled by shape."""
    hidden = subscriber.contract.hidden_size
    states = made_up(subscriber.spec, settings.batch_tokens, hidden, settings.trainer)
    for lengths in settings.lengths:
        progress(f"warming up, {lengths} lengths")
        clock(subscriber.stream(draw(lengths)), None)
        clock(given(draw(lengths), states), step)


def draft_alone(
    settings: Settings, spec: CaptureSpec, hidden: int, step: TrainingStep, draw: Draw, progress: Callable[[str], None]
) -> dict[Lengths, float]:
    """Milliseconds of an optimizer step on states that are in memory already, by lengths."""
    states = made_up(spec, settings.batch_tokens, hidden, settings.trainer)
    found: dict[Lengths, float] = {}
    for lengths in settings.lengths:
        progress(f"the draft alone, {lengths} lengths")
        clocked = clock(given(draw(lengths), states), step, settings.warmup, steps=settings.steps)
        found[lengths] = round(clocked.mean_s * 1e3, 3)
    return found


def train(
    settings: Settings,
    endpoints: Sequence[str],
    transport: str,
    step: TrainingStep,
    draw: Draw,
    progress: Callable[[str], None],
) -> Iterator[tuple[Lengths, int, Clocked]]:
    """Train over one transport; yields lengths, depth and times of each row.

    The first transport has a row for all lengths and depths. The others, which differ in the way alone, have the first
    lengths at the shallowest and the deepest depth.
    """
    whole = transport == settings.transports[0]
    for lengths in settings.lengths if whole else settings.lengths[:1]:
        for depth in settings.depths if whole else sorted({min(settings.depths), max(settings.depths)}):
            progress(f"{transport}, {lengths} lengths, depth {depth}")
            with subscribed(settings, endpoints, transport, depth) as subscriber:
                wait_for_all(subscriber, len(endpoints))
                stream = subscriber.stream(draw(lengths))
                yield lengths, depth, clock(stream, step, settings.warmup, depth > 0, subscriber.stats, settings.steps)


def wait_for_all(subscriber: Subscriber, count: int) -> None:
    """Wait until every daemon is reached: the first one alone would be given all batches of a deep row."""
    limit = time.monotonic() + CONNECT_S
    while len(subscriber.stats().transports) < count:
        if time.monotonic() > limit:
            raise DaemonError(f"only {len(subscriber.stats().transports)} of {count} daemons were reached")
        time.sleep(0.01)  # before anything is timed; a subscriber does not report its second daemon
