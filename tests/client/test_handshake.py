"""Opening a session: what a transport has to show before it is taken, and what is said of those that are not."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zmq

from scripted import MEMORY, SPEC, Daemon, Scripted, Wire, make
from specd.client.conversation import Later, Waiting
from specd.client.handshake import TIMED_TRIES, Terms, open_session
from specd.client.interrupt import Interrupt
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.errors import TransportError
from specd.protocol import messages as wire
from specd.transports.base import SlotRef

TIMED_BYTES = 1 << 20
SLOW_S = 0.3
FLOOR_GB_S = 2 * TIMED_BYTES / SLOW_S / 1e9
"""A transfer of TIMED_BYTES misses it if it takes SLOW_S, and meets it if it takes half of that."""


def install(monkeypatch: pytest.MonkeyPatch, **transports: type[Scripted]) -> None:
    """These are the transports there are, and a little is enough to time them."""
    monkeypatch.setattr("specd.client.handshake.TIMED_BYTES", TIMED_BYTES)
    monkeypatch.setattr("specd.client.handshake.LEAST_TIMED_BYTES", TIMED_BYTES)
    monkeypatch.setattr("specd.client.handshake.load", transports.__getitem__)


class Slow:
    """A fetch's hook that takes its time for the first `count` large transfers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.large = 0

    def __call__(self, ref: SlotRef) -> None:
        if ref.nbytes < TIMED_BYTES:
            return
        self.large += 1
        if self.large <= self.count:
            threading.Event().wait(SLOW_S)


def test_auto_leaves_a_transport_below_its_floor_and_names_both_figures(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow(100)
    crawl = make(slow, floor_gb_s=FLOOR_GB_S)
    install(monkeypatch, crawl=crawl, walk=make())
    caplog.set_level(logging.INFO, "specd.client.handshake")
    with (
        Daemon(context, ("crawl", "walk"), slot_bytes=4 << 20) as daemon,
        daemon.subscriber(transport="auto") as source,
    ):
        assert list(source.stats().transports.values()) == ["walk"]
        assert slow.large == 1 + TIMED_TRIES
        assert crawl.made[0].closed
    (line,) = [record.getMessage() for record in caplog.records]
    assert "transport walk" in line
    assert "not shm: the daemon does not serve it" in line
    assert "not crawl: it moves 1 MiB at 0." in line
    assert f"from {FLOOR_GB_S:g} GB/s on" in line


def test_the_first_large_transfer_sets_things_up_and_a_late_one_is_tried_again(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(2)
    install(monkeypatch, brisk=make(slow, floor_gb_s=FLOOR_GB_S))
    with Daemon(context, ("brisk",), slot_bytes=4 << 20) as daemon, daemon.subscriber(transport="auto") as source:
        assert list(source.stats().transports.values()) == ["brisk"]
    assert slow.large == 3


@pytest.mark.parametrize("asked", ["auto", "crawl"])
def test_who_asks_by_name_or_has_small_slots_gets_a_slow_one(
    asked: str, context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(100)
    install(monkeypatch, crawl=make(slow, floor_gb_s=1e6))
    slot_bytes = TIMED_BYTES - 4096 if asked == "auto" else 4 << 20
    with Daemon(context, ("crawl",), slot_bytes=slot_bytes) as daemon, daemon.subscriber(transport=asked) as source:
        assert list(source.stats().transports.values()) == ["crawl"]
    assert slow.large == 0


def test_a_probe_that_is_not_what_was_sent_is_a_reason(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def garble(ref: SlotRef) -> None:
        MEMORY[ref.slot][1][17] ^= 1

    install(monkeypatch, scripted=make(garble))
    with (
        Daemon(context) as daemon,
        pytest.raises(TransportError, match="'scripted' cannot be used: a probe arrived with other bytes"),
    ):
        daemon.subscriber()


def test_a_plugin_that_fails_in_its_own_way_is_a_reason(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_wire: Wire, offer: bytes, deadline_s: float) -> None:
        raise OSError("no such device")

    broken = make()
    monkeypatch.setattr(Wire, "attach", fail)
    install(monkeypatch, scripted=broken)
    with (
        Daemon(context) as daemon,
        pytest.raises(TransportError, match="'scripted' cannot be used: OSError: no such device"),
    ):
        daemon.subscriber()
    assert broken.made[0].closed


def test_a_session_that_cannot_be_used_is_ended_and_its_client_closed(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(ref: SlotRef) -> None:
        raise TransportError("no way")

    transport = make(fail)
    install(monkeypatch, scripted=transport)
    with Daemon(context) as daemon:
        with pytest.raises(TransportError, match="'scripted' cannot be used: no way"):
            daemon.subscriber()
        daemon.expect(wire.Bye)
    assert transport.made[0].closed


def test_a_transport_is_not_blamed_for_a_worker_that_dies_under_its_probe(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetches: list[SlotRef] = []

    def fail_once(ref: SlotRef) -> None:
        fetches.append(ref)
        if len(fetches) == 1:
            daemon.revoke()
            raise TransportError("nothing came within 10 s")

    install(monkeypatch, scripted=make(fail_once))
    with Daemon(context) as daemon, daemon.subscriber() as source:
        assert list(source.stats().transports.values()) == ["scripted"]
        assert len(daemon.hellos) == len(fetches) == 2


def test_a_transport_that_is_being_opened_is_cancelled_when_the_subscriber_closes(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    attaching = threading.Event()

    def hang(wire: Wire, offer: bytes, deadline_s: float) -> None:
        attaching.set()
        assert wire.cancelled.wait(20)
        raise TransportError("cancelled", lost=True)

    transport = make()
    monkeypatch.setattr(Wire, "attach", hang)
    install(monkeypatch, scripted=transport)
    closing, terms = Interrupt(), Terms("test", lambda contract: SPEC, 1, "scripted", "cpu")
    with Daemon(context) as daemon, ThreadPoolExecutor() as pool:
        waiting = Waiting(closing, lambda reason: None)
        opening = pool.submit(open_session, context, daemon.endpoint, terms, waiting)
        assert attaching.wait(20)
        closing.set()
        with pytest.raises(Later, match="the subscriber is closed"):
            opening.result(20)
        daemon.expect(wire.Bye)
    assert transport.made[0].closed


def test_a_daemon_that_loads_its_first_target_says_so_until_it_has(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, scripted=make())
    told: list[Later] = []

    def tell(reason: Later) -> None:
        told.append(reason)
        daemon.loading_s = 0.0

    with Daemon(context) as daemon:
        daemon.loading_s = 100.0
        terms = Terms("test", lambda contract: SPEC, 1, "scripted", "cpu")
        session = open_session(context, daemon.endpoint, terms, Waiting(Interrupt(), tell))
        session.hang_up()
    assert [(str(reason), reason.loading_s) for reason in told] == [
        (f"the daemon at {daemon.endpoint} is starting its worker", 100.0)
    ]


def test_cuda_is_the_device_that_is_current_where_the_subscriber_is_made(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed: list[tuple[str, str]] = []
    allocated: set[str] = set()

    def claim(device: str) -> None:
        claimed.append((threading.current_thread().name, device))

    install(monkeypatch, scripted=make())
    monkeypatch.setattr("specd.memory.cuda.resolve", lambda device: "cpu" if device == "cpu" else "cuda:3")
    monkeypatch.setattr("specd.memory.cuda.uuid", lambda device: device)
    for module in ("connect", "fetch"):
        monkeypatch.setattr(f"specd.client.{module}.on_device", claim)

    def on_cpu(nbytes: int, device: str) -> torch.Tensor:
        allocated.add(device)
        return torch.empty(nbytes, dtype=torch.uint8)

    monkeypatch.setattr("specd.memory.streams.allocate", on_cpu)
    with Daemon(context) as daemon:
        config = SubscriberConfig(endpoints=(daemon.endpoint,), transport="scripted")
        with Subscriber(config, SPEC, device="cuda", context=context):
            assert daemon.hellos[0].gpus == ("cuda:3",)
        assert allocated == {"cuda:3"}
        with daemon.subscriber():
            assert daemon.hellos[1].gpus == ()
    threads = ("specd-connect", "specd-fetch")
    assert sorted(claimed) == sorted((thread, device) for thread in threads for device in ("cpu", "cuda:3"))
