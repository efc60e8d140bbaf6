"""Rates with real daemons: a slow one takes nothing from a fast one, and two that are equal share the work."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

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


@pytest.fixture(scope="module")
def endpoints() -> Iterator[dict[str, str]]:
    """Those of two fast daemons and a slow one, by name."""
    with private_directory() as place:
        started = {
            name: Daemon(place, name, lease_s=30.0, target=f"synthetic:hidden=32,layers=8,vocab=256,ms={milliseconds}")
            for name, milliseconds in (("fast", FAST), ("equal", FAST), ("slow", SLOW))
        }
        try:
            for daemon in started.values():
                daemon.status()
            yield {name: daemon.endpoint for name, daemon in started.items()}
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


def rate(depth: int, *endpoints: str, count: int = COUNT, warm: int = WARM) -> float:
    """Batches a second."""
    with Subscriber(SubscriberConfig(endpoints=endpoints, depth=depth), CaptureSpec(taps=(1, 5))) as source:
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
def test_a_slow_daemon_takes_nothing_from_a_fast_one(endpoints: dict[str, str], depth: int) -> None:
    alone = rate(depth, endpoints["fast"])
    both = rate(depth, endpoints["slow"], endpoints["fast"])
    print(f"depth {depth}: fast alone {alone:.1f}/s, with a slow one {both:.1f}/s, {both / alone:.2f} ×")
    assert both >= 0.9 * alone


def test_two_equal_daemons_share_the_work(endpoints: dict[str, str]) -> None:
    alone = rate(4, endpoints["fast"])
    both = rate(4, endpoints["fast"], endpoints["equal"])
    print(f"fast alone {alone:.1f}/s, with its equal {both:.1f}/s, {both / alone:.2f} ×")
    assert both >= 1.4 * alone
