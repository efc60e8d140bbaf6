"""Batches in flight when something is lost, hangs, loads for long, or the run ends in between."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq

from samples import batch
from scripted import EXPECT_S, MEMORY, SPEC, Daemon, Scripted, make, wait_for
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.errors import DaemonError, TransportError
from specd.protocol import messages as wire
from specd.transports.base import SlotRef


def use(monkeypatch: pytest.MonkeyPatch, transport: type[Scripted]) -> None:
    monkeypatch.setattr("specd.client.handshake.load", lambda name: transport)


def test_a_transport_that_is_lost_again_and_again_ends_the_run_by_name(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(ref: SlotRef) -> None:
        if MEMORY[ref.slot][1].numel() < 4096:  # a batch, not a probe
            raise TransportError("the communicator is gone", lost=True)

    use(monkeypatch, make(fail, needs_recv_ready=True, abortable=False))
    with Daemon(context) as daemon, daemon.subscriber(depth=0, timeout_s=1.0) as source, ThreadPoolExecutor() as pool:
        found = pool.submit(next, source.stream([batch(3)]))
        for _ in range(3):
            daemon.ready(*daemon.expect(wire.Submit), batch(3))
            for kind in (wire.RecvReady, wire.Bye):
                daemon.expect(kind)
        match = (
            r"batch 3 .* did not come within 1 s .* was submitted [345] times, last the communicator is gone; inproc:"
        )
        with pytest.raises(DaemonError, match=match):
            found.result(EXPECT_S)


def test_closing_cancels_a_transfer_that_does_not_end(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specd.client.fetch.GRACE_S", 0.1)
    moving = threading.Event()

    def hang(ref: SlotRef) -> None:
        if MEMORY[ref.slot][1].numel() < 4096:  # a batch, not a probe
            moving.set()
            assert transport.made[0].cancelled.wait(EXPECT_S)
            raise TransportError("it was cancelled", lost=True)

    transport = make(hang)
    use(monkeypatch, transport)
    with Daemon(context) as daemon, ThreadPoolExecutor() as pool:
        source = daemon.subscriber(depth=0)
        found = pool.submit(next, source.stream([batch(0)]))
        daemon.ready(*daemon.expect(wire.Submit), batch(0))
        assert moving.wait(EXPECT_S)
        began = time.monotonic()
        source.close()
        assert time.monotonic() - began < 2
        assert transport.made[0].closed
        assert isinstance(found.exception(EXPECT_S), Exception)


def test_a_daemon_that_loads_its_worker_is_not_gone(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, make())
    with (
        Daemon(context) as daemon,
        ThreadPoolExecutor() as pool,
        daemon.subscriber(depth=0, timeout_s=0.3, connect_s=0.1) as source,
    ):
        monkeypatch.setattr("specd.client.connect.Connector.connect", lambda connector, link: None)
        (link,) = source._in_flight._links
        link.loading_until = time.monotonic() + 1.0
        daemon.revoke()
        began = time.monotonic()
        wait_for(lambda: link.session is None)
        found = pool.submit(next, source.stream([batch(0)]))
        with pytest.raises(DaemonError, match=r"no daemon for . s .*: the worker died \(longer than it may load\)"):
            found.result(EXPECT_S)
        assert time.monotonic() - began > 0.9


def test_a_worker_that_hangs_is_left_for_another_daemon(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specd.client.pace.LATE_S", 0.3)
    use(monkeypatch, make())
    with Daemon(context) as one, Daemon(context) as two, ThreadPoolExecutor() as pool:
        config = SubscriberConfig(
            endpoints=(one.endpoint, two.endpoint), transport="scripted", depth=0, timeout_s=EXPECT_S
        )
        batches = [batch(i) for i in range(5)]
        with Subscriber(config, SPEC, context=context) as source:
            wait_for(lambda: len(source.stats().transports) == 2)
            stream = source.stream(batches)
            for i in (0, 1):  # both are asked, and answer, until their pace is known
                found = pool.submit(next, stream)
                for daemon in (two, one):
                    daemon.ready(*daemon.expect(wire.Submit), batches[i])
                assert found.result(EXPECT_S).batch.index == i
                for daemon in (two, one):
                    daemon.expect(wire.Release)
            found = pool.submit(next, stream)
            wait_for(lambda: not one.quiet() or not two.quiet())
            hung, other = (one, two) if two.quiet() else (two, one)
            hung.expect(wire.Submit)
            other.ready(*other.expect(wire.Submit), batches[2])
            assert found.result(EXPECT_S).batch.index == 2
            other.expect(wire.Release)
            found = pool.submit(next, stream)
            other.ready(*other.expect(wire.Submit), batches[3])
            assert found.result(EXPECT_S).batch.index == 3
            assert hung.quiet(), "it gets nothing more"
