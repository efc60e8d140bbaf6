"""Rates with real daemons: a slow one takes nothing from a fast one, and two that are equal share the work."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from faults import Daemon, private_directory
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec

FAST, SLOW = 10, 200
"""Milliseconds a batch."""
WARM, COUNT = 10, 80


class Host(NamedTuple):
    """Two fast daemons and a slow one, and their trainer's device."""

    endpoints: dict[str, str]
    device: str


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu(2))])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """On GPUs the fast ones lie on another than the slow one and the trainer, whose batches have 8 MB."""
    small = request.param == "cpu"
    first, second = ("cpu", "cpu") if small else ("cuda:0", "cuda:1")
    hidden = 32 if small else 16384
    with private_directory() as place:
        started = {
            name: Daemon(
                place,
                name,
                lease_s=30.0,
                target=f"synthetic:hidden={hidden},layers=8,vocab=256,ms={milliseconds}",
                device=device,
            )
            for name, milliseconds, device in (("fast", FAST, first), ("equal", FAST, first), ("slow", SLOW, second))
        }
        try:
            for daemon in started.values():
                daemon.status()
            yield Host({name: daemon.endpoint for name, daemon in started.items()}, second)
        finally:
            for daemon in started.values():
                daemon.close()


def batches() -> Iterator[Batch]:
    rng = np.random.default_rng(3)
    for index in itertools.count():
        yield Batch(
            tokens=rng.integers(0, 255, 64, dtype=np.int32),
            lengths=np.array([64], np.int32),
            loss_mask=np.ones(64, np.bool_),
            samples=(index,),
            index=index,
        )


def rate(host: Host, depth: int, *names: str, count: int = COUNT, warm: int = WARM) -> float:
    """Batches a second."""
    endpoints = tuple(host.endpoints[name] for name in names)
    link = SubscriberConfig(endpoints=endpoints, depth=depth)
    with Subscriber(link, CaptureSpec(taps=(1, 5)), device=host.device) as source:
        limit = time.monotonic() + 30
        while len(source.stats().transports) < len(endpoints):
            assert time.monotonic() < limit
            time.sleep(0.01)
        stream = source.stream(batches())
        for index in range(warm):
            assert next(stream).batch.index == index
        began = time.monotonic()
        for index in range(count):
            assert next(stream).batch.index == warm + index
        took = time.monotonic() - began
        stream.close()
    return count / took


@pytest.mark.parametrize("depth", [2, 4, 8])
def test_a_slow_daemon_takes_nothing_from_a_fast_one(host: Host, depth: int) -> None:
    alone = rate(host, depth, "fast")
    both = rate(host, depth, "slow", "fast")
    print(f"depth {depth}: fast alone {alone:.1f}/s, with a slow one {both:.1f}/s, {both / alone:.2f} ×")
    assert both >= 0.9 * alone


def test_two_equal_daemons_share_the_work(host: Host) -> None:
    alone = rate(host, 4, "fast")
    both = rate(host, 4, "fast", "equal")
    print(f"fast alone {alone:.1f}/s, with its equal {both:.1f}/s, {both / alone:.2f} ×")
    assert both >= 1.4 * alone
