"""Borrowed slots: lent before they are seen, released and unmapped only after the training stream has read them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import zmq

from samples import batch
from scripted import EXPECT_S, MEMORY, SPEC, Daemon, Scripted, Work, make, num_fetched, states, wait_for
from specd.client.subscriber import Subscriber
from specd.config.settings import CaptureConfig, DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import embedded
from specd.errors import TransportError
from specd.protocol import messages as wire
from specd.protocol.batch import Delivery
from specd.protocol.capture import CaptureSpec
from specd.transports import inproc
from specd.transports.base import SlotRef, Traits


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    transport = make(borrow=True)
    monkeypatch.setattr("specd.client.handshake.load", lambda name: transport)
    return transport


class Stream:
    """The training stream: its work for each delivery given back. idle: what it is told to do is done at once."""

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.idle = False

    def reached(self, device: str) -> Work:
        self.work.append(Work())
        if self.idle:
            self.work[-1].end()
        return self.work[-1]

    def __getitem__(self, index: int) -> Work:
        """The work for one delivery; waits until that was given back."""
        wait_for(lambda: len(self.work) > index)
        return self.work[index]

    def finish(self) -> None:
        """Do everything, from now on at once."""
        self.idle = True
        for work in self.work:
            work.end()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr("specd.client.inflight.reached", stream.reached)
    return stream


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def check(delivery: Delivery) -> int:
    assert delivery.taps is not None
    assert torch.equal(delivery.taps, states(delivery.batch))
    return delivery.batch.index


def lend(daemon: Daemon, index: int) -> SlotRef:
    """Answer the next request with a slot, and see it borrowed."""
    ref = daemon.ready(*daemon.expect(wire.Submit), batch(index))
    assert daemon.expect(wire.Borrow)[1].lease == ref.slot
    return ref


def test_a_slot_is_released_when_the_training_stream_has_read_it(
    context: zmq.Context[zmq.Socket[bytes]], transport: type[Scripted], work: Stream, pool: ThreadPoolExecutor
) -> None:
    with Daemon(context) as daemon, daemon.subscriber(depth=0, borrow=True) as source:
        assert daemon.hellos[0].credits == 2, "one for the batch asked for, one for the batch in use"
        stream = source.stream([batch(0), batch(1)])
        coming = pool.submit(next, stream)
        one = lend(daemon, 0)
        heard = [type(message) for message in daemon.heard]
        assert heard[3:] == [wire.Probe, wire.Borrow, wire.Release, wire.Submit, wire.Borrow], "as the probe was"
        delivery = coming.result(EXPECT_S)
        assert check(delivery) == 0
        assert delivery.taps is not None
        assert delivery.taps.data_ptr() == MEMORY[one.slot][1].data_ptr(), "it is the slot itself"
        coming = pool.submit(next, stream)
        two = lend(daemon, 1)
        assert check(coming.result(EXPECT_S)) == 1
        assert work[0].awaited.wait(EXPECT_S)
        assert daemon.quiet(), "the stream is not done with it"
        work[0].end()
        assert daemon.expect(wire.Release)[1].lease == one.slot
        assert next(stream, None) is None
        assert daemon.quiet()
        work[1].end()
        assert daemon.expect(wire.Release)[1].lease == two.slot


def test_closing_gives_back_what_is_borrowed_before_it_says_bye(
    context: zmq.Context[zmq.Socket[bytes]], transport: type[Scripted], work: Stream, pool: ThreadPoolExecutor
) -> None:
    with Daemon(context) as daemon:
        source = daemon.subscriber(depth=1, borrow=True)
        stream = source.stream([batch(0), batch(1)])
        coming = pool.submit(next, stream)
        refs = [daemon.ready(*submit, batch(i)) for i, submit in enumerate([daemon.expect(wire.Submit) for _ in "ab"])]
        for _ in refs:
            daemon.expect(wire.Borrow)
        assert check(coming.result(EXPECT_S)) == 0
        wait_for(lambda: num_fetched(source) == 1)
        closing = pool.submit(source.close)
        assert daemon.expect(wire.Release)[1].lease == refs[1].slot, "nobody has looked at it"
        assert work[0].awaited.wait(EXPECT_S)
        assert daemon.quiet()
        assert not transport.made[0].closed
        work[0].end()
        closing.result(EXPECT_S)
        assert daemon.expect(wire.Release)[1].lease == refs[0].slot
        daemon.expect(wire.Bye)
        assert transport.made[0].closed
        stream.close()
        assert len(work.work) == 1, "it is given back once"


def test_a_stream_left_early_gives_all_of_it_back(
    context: zmq.Context[zmq.Socket[bytes]], transport: type[Scripted], work: Stream, pool: ThreadPoolExecutor
) -> None:
    with Daemon(context) as daemon, daemon.subscriber(depth=1, borrow=True) as source:
        stream = source.stream([batch(0), batch(1)])
        coming = pool.submit(lambda: next(stream))
        submits = [daemon.expect(wire.Submit) for _ in "ab"]
        one = daemon.ready(*submits[0], batch(0))
        daemon.expect(wire.Borrow)
        coming.result(EXPECT_S)
        stream.close()
        work[0].end()
        assert daemon.expect(wire.Release)[1].lease == one.slot
        two = daemon.ready(*submits[1], batch(1))
        assert daemon.expect(wire.Release)[1].lease == two.slot, "what comes now is not borrowed"


def test_a_session_lost_under_a_borrowed_batch_leaves_it_intact(
    context: zmq.Context[zmq.Socket[bytes]], transport: type[Scripted], work: Stream, pool: ThreadPoolExecutor
) -> None:
    with Daemon(context) as daemon, daemon.subscriber(depth=1, borrow=True) as source:
        stream = source.stream([batch(0), batch(1)])
        coming = pool.submit(next, stream)
        submits = [daemon.expect(wire.Submit) for _ in "ab"]
        for i, submit in enumerate(submits):
            daemon.ready(*submit, batch(i))
            daemon.expect(wire.Borrow)
        delivery = coming.result(EXPECT_S)
        wait_for(lambda: num_fetched(source) == 1)
        daemon.say(submits[0][0], wire.Revoke(epoch=daemon.epoch, reason="the worker died"))
        daemon.expect(wire.Bye)
        key, submit = daemon.expect(wire.Submit)
        assert key != submits[0][0]
        assert submit.batch_id == submits[1][1].batch_id, "the batch that nobody looked at is asked for again"
        again = daemon.ready(key, submit, batch(1))
        assert daemon.expect(wire.Borrow)[1].lease == again.slot
        assert check(delivery) == 0
        assert not transport.made[0].closed, "its memory is still read"
        assert check(next(stream)) == 1
        assert work[0].awaited.wait(EXPECT_S)
        assert not transport.made[0].closed
        work[0].end()
        wait_for(lambda: transport.made[0].closed)
        assert daemon.quiet(), "the lease went with its session"
        assert not transport.made[1].closed
        work.finish()


def test_a_slot_that_was_refilled_while_borrowed_ends_the_run(
    context: zmq.Context[zmq.Socket[bytes]], transport: type[Scripted], work: Stream, pool: ThreadPoolExecutor
) -> None:
    with Daemon(context) as daemon, daemon.subscriber(depth=0, borrow=True) as source:
        stream = source.stream([batch(0), batch(1)])
        coming = pool.submit(next, stream)
        one = lend(daemon, 0)
        coming.result(EXPECT_S)
        MEMORY[one.slot] = (one.generation + 1, torch.empty(0))
        coming = pool.submit(next, stream)
        daemon.expect(wire.Submit)
        work[0].end()
        with pytest.raises(TransportError, match=r"batch 0 of epoch 0 .* was overwritten while it was borrowed: slot"):
            coming.result(EXPECT_S)


def test_a_slot_that_is_stale_when_it_is_borrowed_is_asked_for_again(
    context: zmq.Context[zmq.Socket[bytes]], transport: type[Scripted], work: Stream, pool: ThreadPoolExecutor
) -> None:
    with Daemon(context, credits=2) as daemon, daemon.subscriber(depth=2, borrow=True) as source:
        coming = pool.submit(list, map(check, source.stream([batch(0), batch(1)])))
        (key, first), (_, second) = [daemon.expect(wire.Submit) for _ in "ab"]
        two = daemon.ready(key, second, batch(1))
        daemon.expect(wire.Borrow)
        wait_for(lambda: num_fetched(source) == 1)
        one = daemon.ready(key, first, batch(0), stale=True)
        daemon.expect(wire.Borrow)
        assert daemon.expect(wire.Release)[1].lease == one.slot
        one = daemon.ready(*daemon.expect(wire.Submit), batch(0))
        daemon.expect(wire.Borrow)
        work[0].end()
        assert daemon.expect(wire.Release)[1].lease == one.slot
        work[1].end()
        assert daemon.expect(wire.Release)[1].lease == two.slot
        assert coming.result(EXPECT_S) == [0, 1]


def test_two_daemons_of_which_one_is_lost_do_not_wait_for_each_other(
    context: zmq.Context[zmq.Socket[bytes]],
    transport: type[Scripted],
    work: Stream,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All credits of one daemon are held by batches behind the one that the other daemon lost."""
    monkeypatch.setattr("specd.client.conversation.FIRST_S", 0.05)  # the lost one is not waited for long
    with Daemon(context, credits=1) as gone, Daemon(context, credits=1) as left:
        config = SubscriberConfig(
            endpoints=(gone.endpoint, left.endpoint), transport="scripted", depth=1, borrow=True, timeout_s=EXPECT_S
        )
        with Subscriber(config, SPEC, context=context) as source:
            wait_for(lambda: len(source.stats().transports) == 2)
            coming = pool.submit(list, map(check, source.stream([batch(0), batch(1)])))
            key, _ = gone.expect(wire.Submit)
            other, second = left.expect(wire.Submit)
            two = left.ready(other, second, batch(1))
            left.expect(wire.Borrow)
            wait_for(lambda: num_fetched(source) == 1)
            gone.deaf = True
            gone.say(key, wire.Revoke(epoch=gone.epoch, reason="it ends"))
            assert left.expect(wire.Release)[1].lease == two.slot
            for index in (0, 1):
                ref = lend(left, index)
                work[index].end()
                assert left.expect(wire.Release)[1].lease == ref.slot
            assert coming.result(EXPECT_S) == [0, 1]
            assert source.stats().resubmitted == 1


def test_what_cannot_be_borrowed_is_an_error_that_says_why(
    context: zmq.Context[zmq.Socket[bytes]], transport: type[Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Daemon(context) as daemon:
        daemon.refuses_to_lend = True
        with pytest.raises(TransportError, match="does not lend its slots: it cannot be watched"):
            daemon.subscriber(borrow=True)
    monkeypatch.setattr("specd.client.handshake.load", lambda name: make())
    for asked in ("scripted", "auto"):
        with Daemon(context) as daemon, pytest.raises(TransportError, match=r"cannot lend slots .*subscriber\.borrow"):
            daemon.subscriber(borrow=True, transport=asked)


class LendingClient(inproc.InprocClient):
    """An inproc client that lends. seen: told what is lent."""

    def seen(self, ref: SlotRef) -> None:
        pass

    def view(self, ref: SlotRef) -> torch.Tensor:
        arena = inproc._arenas[self._token]
        assert arena.generation(ref.slot) == ref.generation
        assert ref.begin is not None
        self.seen(ref)
        return arena.tensor(ref.slot)[ref.begin :][: ref.nbytes]


class Lending:
    traits = Traits(
        memory=frozenset({"host"}), scope="process", one_sided=True, needs_recv_ready=False, abortable=True,
        borrow=True, cuts=True,
    )  # fmt: skip
    server = inproc.Inproc.server

    @staticmethod
    def client(device: str) -> Any:
        return LendingClient()


def test_a_member_of_a_share_reads_in_place_what_lies_in_one_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside one that wants a layer more: final states are lent, taps among others are copied."""
    monkeypatch.setattr("specd.client.handshake.load", lambda name: Lending)
    viewed: list[bool] = []
    monkeypatch.setattr(LendingClient, "seen", lambda self, ref: viewed.append(bool(ref.pieces)))
    settings = DaemonConfig(
        target=TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128"),
        ring=RingConfig(slots=6, max_sessions=2, slot_tokens=64),
        capture=CaptureConfig(num_taps=4, final=True),
    )
    batches = [batch(i) for i in range(20)]
    specs = [CaptureSpec(taps=(), final=True, dtype="float32"), CaptureSpec(taps=(1, 4), dtype="float32")]

    def run(source: Subscriber) -> list[bytes]:
        return [
            states.clone().numpy().tobytes()
            for delivery in source.stream(batches)
            for states in (delivery.taps, delivery.final)
            if states is not None
        ]

    def open_(spec: CaptureSpec, share: str) -> Subscriber:
        config = SubscriberConfig(
            endpoints=(host.endpoint,), depth=1, borrow=bool(share), share=share, timeout_s=EXPECT_S
        )
        return Subscriber(config, spec, context=host.context)

    with embedded(settings) as host:
        alone = []
        for spec in specs:
            with open_(spec, "") as source:
                alone.append(run(source))
        viewed.clear()
        with open_(specs[0], "s") as first, open_(specs[1], "s") as second, ThreadPoolExecutor(2) as pool:
            shared = list(pool.map(run, (first, second)))
            assert first.stats().shared + second.stats().shared >= 15
    assert shared == alone
    assert sum(viewed) >= 20, "none of the final states were lent"


@pytest.mark.parametrize("depth", [0, 3])
def test_a_real_daemon_lends_every_slot_many_times(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specd.client.handshake.load", lambda name: Lending)
    settings = DaemonConfig(
        target=TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128"),
        ring=RingConfig(slots=4, max_sessions=2, slot_tokens=64),
    )
    batches = [batch(i) for i in range(60)]

    def run(borrow: bool) -> list[torch.Tensor]:
        config = SubscriberConfig(endpoints=(host.endpoint,), depth=depth, borrow=borrow, timeout_s=EXPECT_S)
        with Subscriber(config, SPEC, context=host.context) as source:
            return [delivery.taps.clone() for delivery in source.stream(batches) if delivery.taps is not None]

    with embedded(settings) as host:
        lent, copied = run(True), run(False)
    assert len(lent) == 60
    assert all(torch.equal(one, other) for one, other in zip(lent, copied, strict=True))
