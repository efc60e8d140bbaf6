"""A daemon inside this process: what it yields, how it fails, and what is left of it."""

from __future__ import annotations

import threading

import pytest
import zmq

from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import embedded
from specd.errors import DaemonError
from specd.protocol.capture import CaptureSpec

SPEC = CaptureSpec(taps=(1,), dtype="float32")
RING = RingConfig(slots=4, max_sessions=2, slot_tokens=64)


def daemon(model: str = "synthetic:hidden=16,layers=6,vocab=128") -> DaemonConfig:
    return DaemonConfig(target=TargetConfig(model=model, device="cpu"), ring=RING)


def test_a_subscriber_reaches_it_by_what_it_yields() -> None:
    before = {thread.name for thread in threading.enumerate()}
    with embedded(daemon()) as host:
        config = host.subscriber_config(depth=1)
        assert config == SubscriberConfig(endpoints=(host.endpoint,), transport="inproc", depth=1)
        with Subscriber(config, SPEC, context=host.context) as states:
            assert [delivery.batch.index for delivery in states.stream(batch(seed) for seed in range(3))] == [0, 1, 2]
    assert {thread.name for thread in threading.enumerate()} == before, "a thread outlives it"


def test_one_subscriber_reaches_two_that_share_a_context() -> None:
    with zmq.Context() as context, embedded(daemon(), context) as one, embedded(daemon(), context) as other:
        config = SubscriberConfig(endpoints=(one.endpoint, other.endpoint), transport="inproc", timeout_s=20)
        with Subscriber(config, SPEC, context=context) as states:
            assert len(list(states.stream(batch(seed) for seed in range(6)))) == 6
            assert set(states.stats().transports.values()) == {"inproc"}


@pytest.mark.parametrize("model", ["synthetic:hidden=no", "no-such-model-anywhere"])
def test_a_target_that_cannot_be_loaded_is_the_callers_error(model: str) -> None:
    with pytest.raises(DaemonError, match=model.partition(":")[2] or model), embedded(daemon(model)):
        pytest.fail("it was served")
