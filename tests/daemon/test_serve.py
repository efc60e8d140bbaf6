"""A daemon inside this process: what it yields, how it fails, and what is left of it."""

from __future__ import annotations

import logging
import select
import threading
import urllib.request

import msgspec
import pytest
import zmq

from daemons import REPORT
from exposed import lint, samples
from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.exposition import WAITS
from specd.daemon.questions import Questions, ask
from specd.daemon.serve import embedded
from specd.errors import DaemonError
from specd.protocol.capture import CaptureSpec

SPEC = CaptureSpec(taps=(1,), dtype="float32")
RING = RingConfig(slots=4, max_sessions=2, slot_tokens=64)


def daemon(model: str = "synthetic:hidden=16,layers=6,vocab=128") -> DaemonConfig:
    return DaemonConfig(target=TargetConfig(model=model, device="cpu"), ring=RING)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Where metrics are served."""
    return [record.getMessage().removeprefix("metrics at ") for record in caplog.records]


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


def test_its_metrics_are_those_of_what_it_served(caplog: pytest.LogCaptureFixture) -> None:
    settings = msgspec.structs.replace(daemon(), metrics="0")
    with caplog.at_level(logging.INFO, "specd.scrape"), embedded(settings) as host:
        (url,) = said(caplog)
        with Subscriber(host.subscriber_config(depth=1), SPEC, context=host.context, name="one") as states:
            tokens = sum(delivery.batch.num_tokens for delivery in states.stream(batch(seed) for seed in range(3)))
            with urllib.request.urlopen(url, timeout=20) as answer:
                page = answer.read().decode()
    assert lint(page) == []
    found = samples(page)
    assert found["specd_batches_total"] == 3
    assert found["specd_tokens_total"] == tokens
    assert [value for name, value in found.items() if name.startswith("specd_session_tokens_total{")] == [tokens]
    spent = [found[f'specd_worker_seconds_total{{state="{state}"}}'] for state in WAITS]
    assert sum(spent) == pytest.approx(found["specd_uptime_seconds"], abs=1e-3)


def test_who_asks_is_answered_and_a_loop_that_does_not_is_said() -> None:
    questions = Questions()
    try:
        with pytest.raises(TimeoutError, match=r"did not answer within 0.01 s"):
            ask(questions.peer, 0.01)
        questions.answer([questions.fd], lambda: REPORT)  # too late: the next question is not answered with it
        late = msgspec.structs.replace(REPORT, queued=9)

        def loop() -> None:
            assert select.select([questions.fd], [], [], 20)[0]
            questions.answer([questions.fd], lambda: late)

        thread = threading.Thread(target=loop)
        thread.start()
        assert ask(questions.peer, 20) == late
        thread.join()
        peer = questions.peer.dup()
    finally:
        questions.close()
    with peer, pytest.raises(EOFError, match="the daemon is gone"):
        ask(peer, 20)
