"""Links that are slow, long or cut: a subscriber gets through them, and closes within 2 s whatever they do.

`test_network_faults.py` has the campaign, over real packets.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from samples import batch
from scripted import wait_for
from slow_link import SlowLink
from specd.client.ask import ask_status
from specd.client.connect import Connector
from specd.client.guard import Guard
from specd.client.handshake import Terms
from specd.client.interrupt import Interrupt
from specd.client.links import Link
from specd.client.seats import Role
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.protocol.capture import CaptureSpec
from specd.transports.bytes.socket import BytesOffer

SPEC = CaptureSpec(taps=(1, 3), final=True, dtype="float32")
CLOSE_S = 2.0


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Where a daemon listens, on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "specd", "start", "--model", "synthetic:hidden=256,layers=6,vocab=128"]
    command += ["--endpoint", found, "--slots", "8", "--slot-tokens", "2048"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as daemon:
        try:
            wait_for(lambda: ask_status(found, 20).contract is not None)
            yield found
        finally:
            daemon.send_signal(signal.SIGINT)  # it would wait for sessions whose BYE was lost


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SlowLink]]:
    """Makes a link that bytes go over, too."""
    with contextlib.ExitStack() as open_links:

        def make(**facts: Any) -> SlowLink:
            made = open_links.enter_context(SlowLink(**facts))

            def far(offer: BytesOffer) -> str:
                """What a trainer on another host would take: the address alone."""
                return made.through(offer.endpoints[-1])

            monkeypatch.setattr("specd.transports.bytes.client.usable", far)
            return made

        yield make


def subscriber(*endpoints: str, depth: int = 0) -> Subscriber:
    config = SubscriberConfig(endpoints=endpoints, depth=depth, transport="bytes", timeout_s=20, connect_s=20)
    return Subscriber(config, SPEC)


def test_a_round_trip_of_half_a_second_connects_and_brings_batches(
    endpoint: str, link: Callable[..., SlowLink]
) -> None:
    wide = link(rtt_s=0.5)
    with subscriber(wide.through(endpoint)) as source:
        (item,) = source.stream([batch(0)])
        assert item.batch.index == 0
        assert source.stats().reconnects == source.stats().resubmitted == 0
    assert wide.accepted == 2, "one connection for control, one for bytes"


def test_close_does_not_wait_for_a_transfer_over_a_link_that_is_cut(
    endpoint: str, link: Callable[..., SlowLink], caplog: pytest.LogCaptureFixture
) -> None:
    wire = link(mbit_s=20)
    with contextlib.closing(subscriber(wire.through(endpoint), depth=2)) as source:
        next(source.stream(batch(index, (600,)) for index in range(10)))  # 1.8 MB each, 0.7 s
        wire.cut()
        begin = time.monotonic()
        source.close()
        assert time.monotonic() - begin < CLOSE_S
    assert "lost" not in caplog.text


def test_close_does_not_wait_for_a_bulk_connection_that_is_not_there_yet(
    endpoint: str, link: Callable[..., SlowLink], context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    wire, closing, guard = link(), Interrupt(), Guard(threading.Condition())
    wire.cut()
    terms = Terms(name="test", spec=lambda contract: SPEC, credits=1, transport="bytes", device="cpu")
    connector = Connector(context, terms, lambda link, session: False, closing, guard)
    connector.connect(Link(endpoint, Role()))
    wait_for(lambda: wire.accepted == 1)
    begin = time.monotonic()
    closing.set()
    connector.join()
    assert time.monotonic() - begin < CLOSE_S
    guard.check()
