"""The subscriber against an embedded daemon with a synthetic target: order, depth, content, errors."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
import zmq

from samples import batch
from scripted import wait_for
from specd.client.handshake import Session, open_session
from specd.client.seats import Seat
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, ReplayConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.control import Control
from specd.daemon.serve import Embedded, embedded
from specd.daemon.supervisor import Supervisor, ThreadHandle
from specd.errors import BatchError, ConfigError, DaemonError, RejectedError
from specd.protocol import messages as wire
from specd.protocol.batch import Batch, batch_id, slot_bytes
from specd.protocol.capture import CaptureSpec
from specd.transports.base import ServerContext

SPEC = CaptureSpec(taps=(1, 3), final=True, dtype="float32")


def daemon_config(model: str = "synthetic:hidden=16,layers=6,vocab=128", **ring: int) -> DaemonConfig:
    return DaemonConfig(
        target=TargetConfig(model=model), ring=RingConfig(**{"slots": 4, "max_sessions": 2, "slot_tokens": 64, **ring})
    )


@pytest.fixture(scope="module")
def host() -> Iterator[Embedded]:
    with embedded(daemon_config()) as host:
        yield host


def subscriber(host: Embedded, depth: int = 2, **options: object) -> Subscriber:
    config = SubscriberConfig(endpoints=(host.endpoint,), depth=depth, timeout_s=20, connect_s=20)
    return Subscriber(config, SPEC, context=host.context, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_delivers_every_batch_in_order_with_its_own_states(host: Embedded, depth: int) -> None:
    batches = [batch(i, (1 + i % 7, 2)) for i in range(40)]
    seen = []
    with subscriber(host, depth) as source:
        alone = {}
        for item in source.stream(iter(batches)):
            assert item.taps is not None
            assert item.final is not None
            assert item.taps.shape == (item.batch.num_tokens, 2, 16)
            alone[item.batch.index] = item.taps.clone()
            seen.append(item.batch.index)
        again = {item.batch.index: item.taps.clone() for item in source.stream(iter(batches)) if item.taps is not None}
    assert seen == list(range(40))
    assert all(torch.equal(alone[i], again[i]) for i in seen)
    assert not torch.equal(alone[7], alone[14])


def test_two_positions_of_the_same_content_are_two_deliveries(host: Embedded) -> None:
    with subscriber(host, 3) as source:
        items = [
            (d.batch.index, d.taps.clone()) for d in source.stream([batch(1), batch(1), batch(1)]) if d.taps is not None
        ]
    assert len(items) == 3
    assert torch.equal(items[0][1], items[2][1])


def test_a_ring_that_is_too_thin_is_named_once(host: Embedded, caplog: pytest.LogCaptureFixture) -> None:
    thin = "credits 3 of 6 wanted: a ring of 4 slots serves a trainer at depth 2"
    with subscriber(host, 5) as source:
        assert thin in source.thin
    assert [thin in record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [True]
    caplog.clear()
    with subscriber(host, 5, run=bytes(16), ranks=2, seat=Seat(1, 1, 2)) as source:
        assert thin in source.thin, "within the process the ring is this rank's alone"
    with subscriber(host, 2) as source:
        assert not source.thin
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_batch_that_does_not_fit_is_named(host: Embedded) -> None:
    with subscriber(host) as source:
        stream = source.stream([batch(0), batch(1, (4000,)), batch(2)])
        assert next(stream).batch.index == 0
        with pytest.raises(BatchError, match=r"batch 1 of epoch 0 .*ring\.slot_tokens"):
            next(stream)


def test_a_token_outside_the_vocabulary_is_named(host: Embedded) -> None:
    bad = batch(3)
    bad.tokens[2] = 128
    with subscriber(host) as source, pytest.raises(BatchError, match="token id 128 is outside"):
        next(source.stream([bad]))


def test_a_second_stream_is_refused_while_the_first_is_open(host: Embedded) -> None:
    with subscriber(host) as source:
        first = source.stream([batch(0), batch(1)])
        next(first)
        with pytest.raises(ConfigError, match="another stream of this subscriber is open"):
            next(source.stream([batch(2)]))
        assert next(first).batch.index == 1
        first.close()
        assert next(source.stream([batch(2)])).batch.index == 2


def test_a_stream_with_nothing_in_flight_takes_nothing_of_the_next_one(host: Embedded) -> None:
    with subscriber(host) as source:
        first, second = source.stream([batch(0)]), source.stream([batch(1), batch(2), batch(3)])
        next(first)
        assert next(second).batch.index == 1
        with pytest.raises(ConfigError, match="another stream of this subscriber is open"):
            next(first)
        assert [item.batch.index for item in second] == [2, 3], "the end of the first dropped what is the second's"


def test_the_window_never_exceeds_the_depth(host: Embedded) -> None:
    drawn = 0

    def source_of_batches() -> Iterator[Batch]:
        nonlocal drawn
        for i in range(20):
            drawn += 1
            yield batch(i)

    with subscriber(host, 2) as source:
        for count, _ in enumerate(source.stream(source_of_batches())):
            assert drawn <= count + 1 + 2


def test_a_stream_left_early_gives_everything_back(host: Embedded) -> None:
    with subscriber(host, 3) as source:
        for _ in range(20):
            stream = source.stream(batch(i) for i in range(10))
            next(stream)
            stream.close()
        assert [d.batch.index for d in source.stream([batch(5), batch(6)])] == [5, 6]


@pytest.mark.parametrize("length", [3, 100])
def test_a_stream_that_goes_on_after_the_subscriber_was_closed_is_told(host: Embedded, length: int) -> None:
    """Also if all that is missing was in flight: it does not look like the end."""
    source = subscriber(host)
    stream = source.stream(batch(i) for i in range(length))
    next(stream)
    source.close()
    with pytest.raises(DaemonError, match="the subscriber is closed"):
        next(stream)
    with pytest.raises(DaemonError, match="the subscriber is closed"):
        source.artifact("config.json")


def test_an_illegal_tap_is_refused(host: Embedded) -> None:
    config = SubscriberConfig(endpoints=(host.endpoint,))
    with pytest.raises(RejectedError, match="taps"):
        Subscriber(config, CaptureSpec(taps=(5,), dtype="float32"), context=host.context)


def test_another_target_is_refused_with_both_values(host: Embedded) -> None:
    with pytest.raises(RejectedError, match=r"not the trainer's.*synthetic.*another"):
        subscriber(host, fingerprint="another")


def test_two_daemons_with_different_targets_end_the_run(host: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when both are met at the same moment, and so neither could be told of the other's target."""
    both = threading.Barrier(2, timeout=20)

    def together(*arguments: Any) -> Session:
        session = open_session(*arguments)
        both.wait()
        return session

    monkeypatch.setattr("specd.client.connect.open_session", together)
    with embedded(daemon_config("synthetic:hidden=16,layers=6,vocab=128,seed=1"), host.context) as other:
        endpoints = (host.endpoint, other.endpoint)
        config = SubscriberConfig(endpoints=endpoints, depth=0, timeout_s=20, connect_s=20)
        with (
            pytest.raises(RejectedError, match=r"serves target .*synthetic.*, .* serves .*synthetic"),
            Subscriber(config, SPEC, context=host.context) as source,
        ):
            for _ in source.stream(batch(index) for index in itertools.count()):
                pass


def test_artifacts_come_over_the_wire(host: Embedded) -> None:
    with subscriber(host) as source:
        embedding = source.tensor("embedding")
        assert embedding.shape == (128, 16)
        assert b"hidden_size" in source.artifact("config.json")


def test_no_daemon_is_an_error_with_the_endpoint(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specd.client.conversation.FIRST_S", 0.05)
    config = SubscriberConfig(endpoints=(f"ipc://{tmp_path}/none.sock",), connect_s=0.2)
    with pytest.raises(DaemonError, match=r"none\.sock"):
        Subscriber(config, SPEC)


def test_two_daemons_share_the_work_and_order_holds() -> None:
    with zmq.Context() as context, embedded(daemon_config(), context) as one, embedded(daemon_config(), context) as two:
        config = SubscriberConfig(endpoints=(one.endpoint, two.endpoint), depth=5, timeout_s=20)
        with Subscriber(config, SPEC, context=context) as source:
            seen = [item.batch.index for item in source.stream(batch(i) for i in range(60))]
            served = [ask(context, host.endpoint).counters["batches"] for host in (one, two)]
    assert seen == list(range(60))
    assert min(served) > 10


def test_two_daemons_that_keep_states_have_each_batch_once_and_replay_it() -> None:
    """What the writer skipped in one epoch it takes in the next, as it does what went elsewhere in a burst."""
    config = msgspec.structs.replace(daemon_config(slots=8), replay=ReplayConfig(ram_gb=0.01))
    with zmq.Context() as context, embedded(config, context) as one, embedded(config, context) as two:
        link = SubscriberConfig(endpoints=(one.endpoint, two.endpoint), depth=3, timeout_s=20)
        with Subscriber(link, SPEC, context=context, keeping="home") as source:
            wait_for(lambda: len(source.stats().transports) == 2)
            states: list[torch.Tensor] = []
            replayed = 0
            for epoch in range(6):
                before = source.stats().replayed
                now = [torch.cat([item.taps.flatten(), item.final.flatten()])
                       for item in source.stream(batch(i) for i in range(40))
                       if item.taps is not None and item.final is not None]  # fmt: skip
                states = states or now
                assert all(map(torch.equal, now, states)), f"epoch {epoch}"
                replayed = source.stats().replayed - before
            reports = [ask(context, host.endpoint).replay for host in (one, two)]
    assert replayed >= 36
    assert 36 <= sum(report.used for report in reports if report is not None) <= 40


@pytest.mark.parametrize("told", [True, False])
def test_a_daemon_that_is_told_how_long_an_epoch_is_keeps_its_part_of_a_long_one(told: bool) -> None:
    size = slot_bytes(SPEC, 16, 64)
    config = msgspec.structs.replace(daemon_config(slots=8), replay=ReplayConfig(ram_gb=6 * (size + 8192) / 1e9))
    with embedded(config) as host, subscriber(host, keeping="home") as source:
        assert source.replay is not None
        assert 2 <= source.replay.cells <= 8, "so that 60 batches are over four times as many"
        if told:
            source.tell_epoch(60)
        hits = []
        for _ in range(4):
            before = source.stats().replayed
            for item in source.stream(batch(i) for i in range(60)):
                assert item.taps is not None
            hits.append(source.stats().replayed - before)
    assert hits[2:] == [source.replay.cells if told else 0] * 2, "in the same order, so what is evicted is never hit"


def ask(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> wire.StatusReport:
    with context.socket(zmq.DEALER) as peer:
        peer.connect(endpoint)
        peer.send(wire.encode(wire.Status()))
        assert peer.poll(20_000)
        report = wire.decode_reply(peer.recv())
        assert isinstance(report, wire.StatusReport)
        return report


def test_a_trainer_that_holds_all_it_may_does_not_block_another(host: Embedded) -> None:
    with host.context.socket(zmq.DEALER) as greedy:
        greedy.set(zmq.LINGER, 0)
        greedy.connect(host.endpoint)
        hello = wire.Hello(name="greedy", host="elsewhere", pid=0, transports=("inproc",), spec=SPEC, credits=100)
        greedy.send(wire.encode(hello))
        welcome = wire.decode_reply(greedy.recv())
        for index in range(welcome.credits):
            work = batch(1000 + index)
            identity = batch_id(welcome.contract.fingerprint, work.tokens, work.lengths)
            submit = wire.Submit(
                epoch=welcome.epoch,
                seq=index,
                batch_id=identity,
                tokens=work.tokens.tobytes(),
                lengths=work.lengths.tobytes(),
            )
            greedy.send(wire.encode(submit))
            assert isinstance(wire.decode_reply(greedy.recv()), wire.Ready)
        held = ask(host.context, host.endpoint)
        assert held.slots["free"] == 1, "all but the slot that belongs to whoever comes next"
        with subscriber(host, 2) as source:
            assert [item.batch.index for item in source.stream(batch(i) for i in range(30))] == list(range(30))
        greedy.send(wire.encode(wire.Bye(epoch=welcome.epoch)))


def test_draining_serves_what_is_outstanding_and_refuses_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specd.client.conversation.FIRST_S", 0.2)  # a daemon that has ended is not waited for long
    monkeypatch.setattr("specd.client.conversation.STEP_S", 2.0)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    endpoint = "inproc://drain-test"
    settings = msgspec.structs.replace(
        daemon_config("synthetic:hidden=16,layers=6,vocab=128,ms=50"), transports=("inproc",)
    )
    supervisor = Supervisor(settings, lambda w: ThreadHandle(w, context), endpoint, ServerContext(), context)
    control = Control(settings, (endpoint,), supervisor, context)
    thread = threading.Thread(target=control.run)
    thread.start()
    config = SubscriberConfig(endpoints=(endpoint,), depth=0, timeout_s=20, connect_s=1)
    with Subscriber(config, SPEC, context=context) as source:
        stream = source.stream(batch(i) for i in range(5))
        assert next(stream).batch.index == 0
        control.ending.drain()
        with pytest.raises(DaemonError, match="no daemon"):
            next(stream)
    thread.join(20)
    assert not thread.is_alive()
    control.close()
    context.destroy(linger=0)


def test_no_socket_is_bound_with_the_endless_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that dies while its socket is closed would keep the daemon from ending."""
    bound = []
    bind = zmq.Socket.bind

    def note(self: zmq.Socket[bytes], address: str) -> object:
        bound.append((address, self.get(zmq.LINGER)))
        return bind(self, address)

    monkeypatch.setattr(zmq.Socket, "bind", note)
    with embedded(daemon_config()):
        pass
    assert len(bound) == 3, "for trainers, to the worker, and from it"
    assert [address for address, linger in bound if not 0 <= linger <= 1000] == []  # type: ignore[operator]
