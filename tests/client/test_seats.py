"""Seats: which daemons a rank takes, and whether their rings are deep enough for all that come."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq

from samples import batch
from scripted import EXPECT_S, SPEC, Daemon, make, wait_for
from specd.client.seats import Role, Seat, roles, share, thin
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.errors import BatchError, ConfigError
from specd.protocol import messages as wire
from specd.protocol.contract import ReplayInfo

FAR = tuple(f"tcp://240.0.0.{number}:7070" for number in range(1, 6))  # reserved: no host has them


def taken(found: list[Role]) -> list[int]:
    """The daemons that do not stand by."""
    return [place for place, each in enumerate(found) if not each.standby]


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("count", range(1, 8))
def test_everybody_takes_an_even_share_and_nothing_is_left(size: int, count: int) -> None:
    shares = [share(size, index, count) for index in range(count)]
    assert all(shares)
    come = Counter(thing for each in shares for thing in each)
    assert set(come) == set(range(size))
    assert max(come.values()) - min(come.values()) <= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("ranks", range(2, 9))
@pytest.mark.parametrize("daemons", range(1, 6))
def test_a_daemon_is_told_how_many_ranks_come(ranks: int, daemons: int) -> None:
    found = [roles(FAR[:daemons], ranks, Seat(rank, 0, 1), near=True) for rank in range(ranks)]
    come = Counter(place for each in found for place in taken(each))
    for place in range(daemons):
        assert {each[place].ranks for each in found} == {come[place]}, "all ranks say the same"


def test_daemons_of_the_own_host_come_first() -> None:
    mixed = (FAR[0], "ipc:///run/a.sock", "tcp://127.0.0.1:7070", FAR[1])
    found = [roles(mixed, 8, Seat(4 + local, local, 4), near=True) for local in range(4)]
    assert [taken(each) for each in found] == [[1], [1], [2], [2]]
    assert [each.ranks for each in found[0]] == [1, 2, 2, 1]
    assert taken(roles(mixed, 8, Seat(4, 0, 1), near=True)) == [1, 2], "one rank on this host, two daemons on it"


def test_all_daemons_are_taken_when_asked_for_and_by_one_rank() -> None:
    mixed = (FAR[0], "ipc:///run/a.sock", "inproc://own")
    assert roles(mixed, 8, Seat(5, 1, 4), near=False) == [Role(8), Role(4), Role(1)]
    assert roles(mixed, 8, None, near=True) == [Role(8), Role(8), Role(1)]
    assert roles(mixed, 1, Seat(0, 0, 1), near=True) == [Role()] * 3
    assert roles(("inproc://own",), 4, Seat(1, 1, 4), near=True) == [Role()], "each rank hosts its own target"


def test_a_thin_ring_is_told_with_the_ring_that_is_deep_enough() -> None:
    assert thin(8, 4, 3, 4) == (
        "credits 2 of 3 wanted: a ring of 8 slots serves 4 ranks at depth 1; specd start … --trainers 4 --depth 2 "
        "(12 slots)"
    )
    assert not thin(12, 8, 3, 4)
    assert "serves a trainer at depth 0" in thin(4, 0, 3, 1)
    assert not thin(8, 4, 5, 1)


def test_a_daemon_that_stands_by_serves_only_while_the_own_one_is_down(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specd.client.links.STANDBY_S", 0.1)
    made = make()
    monkeypatch.setattr("specd.client.handshake.load", lambda name: made)
    with Daemon(context) as own, Daemon(context) as other, ThreadPoolExecutor() as pool:
        config = SubscriberConfig(
            endpoints=(own.endpoint, other.endpoint), transport="scripted", depth=0, timeout_s=EXPECT_S
        )
        batches = [batch(i) for i in range(3)]
        with Subscriber(config, SPEC, context=context, run=bytes(16), ranks=2, seat=Seat(0, 0, 2)) as source:
            stream = source.stream(batches)

            def train(daemon: Daemon, index: int) -> None:
                found = pool.submit(next, stream)
                daemon.ready(*daemon.expect(wire.Submit), batches[index])
                assert found.result(EXPECT_S).batch.index == index
                daemon.expect(wire.Release)

            train(own, 0)
            assert [(hello.run, hello.ranks) for hello in own.hellos] == [(bytes(16), 1)]
            assert not other.heard, "it was not even dialled"
            own.loading_s = 600.0
            own.revoke()
            own.expect(wire.Bye)
            train(other, 1)
            own.loading_s = 0.0
            other.expect(wire.Bye)
            wait_for(lambda: list(source.stats().transports) == [own.endpoint])
            train(own, 2)
            assert len(other.hellos) == 1
            assert source.stats().reconnects == 1, "that it was left is none"


def test_a_batch_that_fits_no_own_daemon_is_refused_though_others_stand_by(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    monkeypatch.setattr("specd.client.handshake.load", lambda name: made)
    with Daemon(context, slot_bytes=64) as own, Daemon(context) as other:
        config = SubscriberConfig(endpoints=(own.endpoint, other.endpoint), transport="scripted", timeout_s=EXPECT_S)
        with Subscriber(config, SPEC, context=context, run=bytes(16), ranks=2, seat=Seat(0, 0, 2)) as source:
            source.check_slots(4)
            with pytest.raises(ConfigError, match=rf"^{own.endpoint}: 1 tap = 16 bytes a token, .*=1 --set"):
                source.check_slots(5)
            with pytest.raises(BatchError, match=r"the largest slot of any daemon has 64"):
                next(source.stream([batch(0, (30,))]))


def test_batches_that_come_again_may_be_kept_by_one_daemon_alone_and_are_counted_when_replayed(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make()
    monkeypatch.setattr("specd.client.handshake.load", lambda name: made)
    keeps = ReplayInfo(cells=9, used=0, cell_bytes=4096)
    batches = [batch(index) for index in range(8)]
    sources: list[wire.Source] = ["forward", "joined", "replay", "kept", "replay", "replay", "forward", "forward"]
    asked: list[tuple[bytes, str, bool]] = []
    off = ReplayInfo(cells=0, used=0, cell_bytes=4096, failed="3 errors in a row")
    with Daemon(context, replay=keeps) as one, Daemon(context, replay=keeps) as two, Daemon(context, replay=off) as bad:
        daemons = one, two, bad
        endpoints = tuple(daemon.endpoint for daemon in daemons)
        config = SubscriberConfig(endpoints=endpoints, transport="scripted", depth=0, timeout_s=EXPECT_S)

        done = threading.Event()

        def serve() -> None:
            """Answer all requests, also the copies that the pace of a daemon is measured by."""
            while not done.wait(0.002):
                for daemon in daemons:
                    while not daemon.quiet():
                        key, message = daemon.expect(wire.Message)
                        if isinstance(message, wire.Submit):
                            asked.append((message.batch_id, daemon.endpoint, message.keep))
                            daemon.ready(key, message, batches[message.seq - 1], source=sources[message.seq - 1])

        with Subscriber(config, SPEC, context=context, keeping="home") as source, ThreadPoolExecutor(1) as pool:
            wait_for(lambda: len(source.stats().transports) == 3)
            assert (source.replay in (keeps, off), source.stands_by) == (True, False)
            served = pool.submit(serve)
            try:
                assert [delivery.batch.index for delivery in source.stream(batches)] == list(range(8))
            finally:
                done.set()
            served.result(EXPECT_S)
            stats = source.stats()

    def score(identity: bytes, endpoint: str) -> bytes:
        return hashlib.blake2b(identity + endpoint.encode(), digest_size=8).digest()

    for identity, endpoint, keep in asked:
        home = max((one.endpoint, two.endpoint), key=lambda end: score(identity, end))
        assert keep == (endpoint == home), "written down: another hash would find nothing of an earlier run"
    assert len(asked) >= len(batches)
    assert (stats.replayed, stats.shared) == (3, 2)
