"""Batches in flight over real threads: announced early, fetched in order, into buffers that nobody reads any more."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import zmq

from samples import batch
from scripted import CONTRACT, EXPECT_S, SPEC, Daemon, Scripted, Wire, Work, make, states, wait_for
from specd.client.guard import Guard
from specd.client.handshake import Session, open_session
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.errors import ProtocolError, SpecdError, TransportError
from specd.protocol import messages as wire
from specd.protocol.batch import Batch, Delivery, batch_id
from specd.transports.base import SlotRef

Install = Callable[[type[Scripted]], type[Scripted]]


class Receiving(Wire):
    """A client that is a Receiver, and fails once it is lost as one does. Cancelled, what a gate holds of it fails."""

    def __init__(self, fetching: Callable[[SlotRef], None]) -> None:
        super().__init__(fetching)
        self.expected: deque[tuple[SlotRef, int]] = deque()
        self.lost = False

    def expect(self, ref: SlotRef, into: torch.Tensor) -> None:
        assert not self.closed
        self.expected.append((ref, into.data_ptr()))

    def cancel(self) -> None:
        super().cancel()
        if isinstance(self._fetching, Gate):
            self._fetching.open(TransportError("it was cancelled", lost=True))

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        if self.expected:
            assert self.expected.popleft() == (ref, into.data_ptr())
        if self.lost:
            raise TransportError("it was lost", lost=True)
        try:
            super().fetch(ref, into, deadline_s)
        except TransportError as error:
            self.lost = error.lost
            raise


@pytest.fixture(params=[Wire, Receiving])
def install(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Install:
    def install(transport: type[Scripted]) -> type[Scripted]:
        def client(device: str) -> Wire:
            transport.made.append(request.param(transport.fetching))
            return transport.made[-1]

        monkeypatch.setattr(transport, "client", staticmethod(client))
        monkeypatch.setattr("specd.client.handshake.load", lambda name: transport)
        return transport

    return install


class Gate:
    """A fetch's hook that lets probes through and holds every batch until it is told what becomes of it."""

    def __init__(self) -> None:
        self.held: queue.SimpleQueue[SlotRef] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[TransportError | None] = queue.SimpleQueue()
        self.shut = False

    def __call__(self, ref: SlotRef) -> None:
        if not self.shut:
            return
        self.held.put(ref)
        if (error := self._verdicts.get(timeout=EXPECT_S)) is not None:
            raise error

    def open(self, error: TransportError | None = None) -> None:
        self._verdicts.put(error)


def check(delivery: Delivery) -> int:
    assert delivery.taps is not None
    assert torch.equal(delivery.taps, states(delivery.batch))
    return delivery.batch.index


def serve(daemon: Daemon, batches: list[Batch], ended: set[bytes]) -> None:
    """Announce each batch when it is asked for, until all are released; no session of `ended` may ask for one."""
    waiting, released = list(batches), 0
    while released < len(batches):
        key, message = daemon.expect(wire.Message)
        assert key not in ended
        if isinstance(message, wire.Submit):
            daemon.ready(key, message, waiting.pop(0))
        released += isinstance(message, wire.Release)


def test_all_that_is_ready_is_announced_while_the_first_is_still_fetched(
    context: zmq.Context[zmq.Socket[bytes]], install: Install
) -> None:
    gate = Gate()
    install(make(gate, needs_recv_ready=True))
    with Daemon(context) as daemon, daemon.subscriber(depth=2) as source, ThreadPoolExecutor() as pool:
        gate.shut = True
        stream = source.stream([batch(i) for i in range(3)])
        first = pool.submit(next, stream)
        submits = [daemon.expect(wire.Submit) for _ in range(3)]
        refs = [daemon.ready(key, submit, batch(i)) for i, (key, submit) in enumerate(submits)]
        announced = [daemon.expect(wire.RecvReady)[1].lease for _ in refs]
        assert announced == [ref.slot for ref in refs]
        for ref in refs:
            assert gate.held.get(timeout=EXPECT_S) == ref, "they are fetched in the order they were announced in"
            gate.open()
        assert check(first.result(EXPECT_S)) == 0
        assert [check(delivery) for delivery in stream] == [1, 2]


def test_what_was_announced_is_fetched_even_if_nobody_wants_it_any_more(
    context: zmq.Context[zmq.Socket[bytes]], install: Install
) -> None:
    gate = Gate()
    install(make(gate, needs_recv_ready=True))
    with Daemon(context) as daemon, daemon.subscriber(depth=2) as source, ThreadPoolExecutor() as pool:
        gate.shut = True
        stream = source.stream([batch(i) for i in range(3)])
        first = pool.submit(next, stream)
        submits = [daemon.expect(wire.Submit) for _ in range(3)]
        refs = [daemon.ready(*submits[i], batch(i)) for i in (0, 1)]
        for _ in refs:
            daemon.expect(wire.RecvReady)
        gate.held.get(timeout=EXPECT_S)
        gate.open()
        assert check(first.result(EXPECT_S)) == 0
        assert daemon.expect(wire.Release)[1].lease == refs[0].slot
        assert gate.held.get(timeout=EXPECT_S) == refs[1]
        stream.close()
        assert daemon.quiet(), "a transfer in flight keeps its lease"
        late = daemon.ready(*submits[2], batch(2))
        assert daemon.expect(wire.Release)[1].lease == late.slot, "what was not announced yet is only given back"
        gate.open()
        assert daemon.expect(wire.Release)[1].lease == refs[1].slot

        again = pool.submit(list, map(check, source.stream([batch(7)])))
        ref = daemon.ready(*daemon.expect(wire.Submit), batch(7))
        daemon.expect(wire.RecvReady)
        assert gate.held.get(timeout=EXPECT_S) == ref
        gate.open()
        assert again.result(EXPECT_S) == [7]


def test_a_lost_transport_is_attached_anew_and_only_what_was_in_flight_pays(
    context: zmq.Context[zmq.Socket[bytes]], install: Install
) -> None:
    gate = Gate()
    transport = install(make(gate, needs_recv_ready=True, abortable=False))
    with Daemon(context) as daemon, daemon.subscriber(depth=1) as source, ThreadPoolExecutor() as pool:
        gate.shut = True
        found = pool.submit(list, map(check, source.stream([batch(i) for i in range(3)])))
        submits = [daemon.expect(wire.Submit) for _ in range(2)]
        for i, submit in enumerate(submits):
            daemon.ready(*submit, batch(i))
            daemon.expect(wire.RecvReady)
        gate.held.get(timeout=EXPECT_S)
        gate.shut = False
        gate.open(TransportError("the communicator is gone", lost=True))
        assert daemon.expect(wire.Bye)[0] == submits[0][0]
        serve(daemon, [batch(i) for i in range(3)], {submits[0][0]})
        assert found.result(EXPECT_S) == [0, 1, 2]
        stats = source.stats()
        assert (stats.reconnects, stats.resubmitted) == (1, 2)
        assert transport.made[0].closed
        assert not transport.made[1].closed
    assert transport.made[1].closed


def test_a_lost_daemons_transfer_is_cancelled_and_its_batches_come_from_another(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    transport = make(gate, needs_recv_ready=True, abortable=False)
    made: list[Receiving] = []

    def client(device: str) -> Receiving:
        made.append(Receiving(gate))
        return made[-1]

    monkeypatch.setattr(transport, "client", client)
    monkeypatch.setattr("specd.client.handshake.load", lambda name: transport)
    monkeypatch.setattr("specd.client.conversation.FIRST_S", 0.05)  # the lost one is not waited for long
    batches = {batch_id(CONTRACT.fingerprint, each.tokens, each.lengths): each for each in map(batch, range(3))}
    with Daemon(context) as one, Daemon(context) as two, ThreadPoolExecutor() as pool:
        config = SubscriberConfig(
            endpoints=(one.endpoint, two.endpoint), transport="scripted", depth=2, timeout_s=EXPECT_S
        )
        with Subscriber(config, SPEC, context=context) as source:
            wait_for(lambda: len(source.stats().transports) == 2)
            gate.shut = True
            found = pool.submit(list, map(check, source.stream(batches.values())))
            key, submit = one.expect(wire.Submit)
            one.expect(wire.Submit)
            one.ready(key, submit, batches[submit.batch_id])
            one.expect(wire.RecvReady)
            gate.held.get(timeout=EXPECT_S)
            key, submit = two.expect(wire.Submit)
            two.ready(key, submit, batches[submit.batch_id])
            two.expect(wire.RecvReady)
            gate.shut = False
            one.deaf = True
            one.revoke()  # nothing tells the transfer
            released = 0
            while released < 3:
                key, message = two.expect(wire.Message)
                if isinstance(message, wire.Submit):
                    two.ready(key, message, batches[message.batch_id])
                released += isinstance(message, wire.Release)
            assert found.result(EXPECT_S) == [0, 1, 2]
            assert source.stats().resubmitted == 2, "what was in flight, and what was not captured yet"
            assert [client.closed for client in made].count(True) == 1


def test_a_buffer_is_written_again_only_when_the_training_stream_has_read_it(
    context: zmq.Context[zmq.Socket[bytes]], install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(make())
    points: list[Work] = []

    def reached(device: str) -> Work:
        assert device == "cpu"
        points.append(Work())
        return points[-1]

    monkeypatch.setattr("specd.client.inflight.reached", reached)
    with Daemon(context) as daemon, daemon.subscriber(depth=0) as source, ThreadPoolExecutor() as pool:
        batches = [batch(i) for i in range(4)]
        stream = source.stream(batches)

        def bring(index: int) -> Delivery:
            coming = pool.submit(next, stream)
            daemon.ready(*daemon.expect(wire.Submit), batches[index])
            daemon.expect(wire.Release)
            return coming.result(EXPECT_S)

        one = bring(0)
        two = bring(1)
        assert one.taps is not None
        assert two.taps is not None
        assert len(points) == 1
        assert check(one) == 0, "its stream has not read it yet, so another buffer is used"
        third = pool.submit(next, stream)
        daemon.ready(*daemon.expect(wire.Submit), batches[2])
        assert points[0].awaited.wait(EXPECT_S)
        threading.Event().wait(0.05)
        assert daemon.quiet(), "both buffers are still read: the transfer has not begun"
        assert check(one) == 0
        assert check(two) == 1
        points[0].end()
        daemon.expect(wire.Release)
        three = third.result(EXPECT_S)
        assert source.stats().fetch_s < 0.05, "the wire is not charged with that wait"
        assert three.taps is not None
        assert three.taps.data_ptr() == one.taps.data_ptr()
        assert check(two) == 1
        for point in points:
            point.end()
        last = bring(3)
        assert check(last) == 3
        for point in points:
            point.end()
        assert next(stream, None) is None
        points[-1].end()


def test_closing_ends_a_transfer_before_the_session(context: zmq.Context[zmq.Socket[bytes]], install: Install) -> None:
    gate = Gate()
    transport = install(make(gate, needs_recv_ready=True))
    with Daemon(context) as daemon, ThreadPoolExecutor() as pool:
        source = daemon.subscriber(depth=1)
        gate.shut = True
        stream = source.stream([batch(0), batch(1)])
        coming = pool.submit(next, stream)
        submits = [daemon.expect(wire.Submit) for _ in range(2)]
        for i, submit in enumerate(submits):
            daemon.ready(*submit, batch(i))
            daemon.expect(wire.RecvReady)
        gate.held.get(timeout=EXPECT_S)
        gate.open()
        coming.result(EXPECT_S)
        daemon.expect(wire.Release)
        gate.held.get(timeout=EXPECT_S)
        closing = pool.submit(source.close)
        wait_for(source._in_flight._closing.is_set)
        assert daemon.quiet()
        gate.open()
        closing.result(EXPECT_S)
        daemon.expect(wire.Release)
        daemon.expect(wire.Bye)
        assert all(client.closed for client in transport.made)
        stream.close()


def test_a_session_that_is_up_only_after_the_run_has_ended_is_not_kept(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would read its socket any more, or close it."""
    monkeypatch.setattr("specd.client.handshake.load", lambda name: make())
    ended = threading.Event()
    fail = Guard.fail

    def fail_late(guard: Guard, error: SpecdError) -> None:
        ended.set()
        two.expect(wire.Bye)  # the loop has ended, and its error is not known yet
        fail(guard, error)

    monkeypatch.setattr(Guard, "fail", fail_late)

    def late(context: Any, endpoint: str, terms: Any, pause: Any) -> Session:
        if endpoint == two.endpoint:
            assert ended.wait(EXPECT_S)
        return open_session(context, endpoint, terms, pause)

    monkeypatch.setattr("specd.client.connect.open_session", late)
    with Daemon(context) as one, Daemon(context) as two:
        config = SubscriberConfig(
            endpoints=(one.endpoint, two.endpoint), transport="scripted", depth=0, timeout_s=EXPECT_S
        )
        with Subscriber(config, SPEC, context=context) as source, ThreadPoolExecutor() as pool:
            found = pool.submit(next, source.stream([batch(0)]))
            key, _ = one.expect(wire.Submit)
            one.say(key, wire.Error(epoch=one.epoch, reason="what?"))
            with pytest.raises(ProtocolError, match="refused a message: what"):
                found.result(EXPECT_S)
