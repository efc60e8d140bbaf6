"""nccl over a stand-in: notes that travel with the next payload, receives that are posted ahead, and their deaths."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import fake_cuda
from fake_nccl import NCCL, REMOTE_ERROR, FakeTransport, reset, rigged, sender_ends, until
from specd.bench.transport import wires
from specd.client.fetch import Fetcher, Item
from specd.client.guard import Guard
from specd.client.handshake import Session
from specd.errors import TransportError
from specd.memory import device_arena
from specd.protocol.cut import Piece, gather
from specd.transports.base import Client, Receiver, SlotRef
from specd.transports.checks import pattern
from specd.transports.nccl import communicator as nccl_comm
from specd.transports.nccl import sender as nccl_sender
from specd.transports.nccl.transfer import WINDOW
from specd.transports.testing.suite import Rig, holds


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_cuda.install(monkeypatch)
    with reset():
        yield


@pytest.fixture
def rig() -> Iterator[Rig]:
    with rigged() as rig:
        yield rig


def test_a_note_travels_with_the_next_payload_if_there_is_one_in_time(rig: Rig) -> None:
    client = rig.attach()
    for slot in range(3):
        rig.host.fill(slot, 1, b"%d" % slot, 4096)
    NCCL.launches.clear()
    rig.host.publish(b"one", SlotRef(0, 1, 4096))
    until(lambda: NCCL.launches[0] == 2)  # nothing follows, so the note is sent
    for slot in (1, 2):
        rig.host.publish(b"one", SlotRef(slot, 1, 4096))
    until(lambda: NCCL.launches[0] == 4)
    assert not threading.Event().wait(0.05)
    assert NCCL.launches[0] == 4, "the last payload has not begun, and its note can wait for another"
    for slot in range(3):
        into = rig.destination(4096)
        client.fetch(SlotRef(slot, 1, 4096), into, 20.0)
        assert holds(into[:4096], b"%d" % slot)
    assert NCCL.launches == {0: 5, 1: 3}


def test_a_refill_behind_a_payload_is_told_of_with_the_next(rig: Rig) -> None:
    """The generation is read behind the payload, however late it is sent."""
    client = rig.attach()
    for slot in range(3):
        rig.host.fill(slot, 1, b"%d" % slot, 4096)
    payloads = itertools.count()
    NCCL.on_payload = lambda: rig.host.begin(1) if next(payloads) == 1 else None
    for slot in range(3):
        rig.host.publish(b"one", SlotRef(slot, 1, 4096))
    for slot in range(3):
        into = rig.destination(4096)
        if slot == 1:
            with pytest.raises(TransportError, match="holds generation 0, the lease is for 1"):
                client.fetch(SlotRef(1, 1, 4096), into, 20.0)
        else:
            client.fetch(SlotRef(slot, 1, 4096), into, 20.0)
            assert holds(into[:4096], b"%d" % slot)


ODD = tuple(Piece(64 + 1024 * row, 512 * row, 1, 512, 512, 512) for row in range(7))
"""Seven stretches that do not follow one another."""


def test_states_are_cut_out_of_one_slot_after_the_other_into_one_scratch(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are published before the first is taken: a cut that did not wait for the send before it would show."""
    made: list[int] = []
    memory = device_arena.private_memory

    def noted(nbytes: int, device: str) -> torch.Tensor:
        made.append(nbytes)
        return memory(nbytes, device)

    monkeypatch.setattr(device_arena, "private_memory", noted)
    client = rig.attach()
    for slot in range(3):
        rig.host.fill(slot, 1, b"%d" % slot, 8192)
    refs = [SlotRef(count % 3, 1, 3584, ODD) for count in range(WINDOW)]
    refs[2] = SlotRef(2, 1, 4096, (Piece(4096, 0, 1, 4096, 4096, 4096),))
    intos = expect(client, rig, refs)
    for ref in refs[:6]:  # as many as wait for a trainer
        rig.host.publish(b"one", ref)
    for index, (ref, into) in enumerate(zip(refs, intos, strict=True)):
        if index >= 6:
            rig.host.publish(b"one", ref)
        client.fetch(ref, into, 20.0)
        expected = gather(pattern(b"%d" % ref.slot, 8192).data, ref.pieces, 0, ref.nbytes)
        assert bytes(into[: ref.nbytes].numpy()) == bytes(expected), index
    assert made == [8192], "a scratch as large as a slot, once a session"


def test_a_slot_that_is_refilled_behind_the_cut_is_stale(rig: Rig) -> None:
    client = rig.attach()
    rig.host.fill(0, 1, b"old", 8192)
    NCCL.on_payload = lambda: rig.host.begin(0)
    with pytest.raises(TransportError, match="holds generation 0, the lease is for 1") as refusal:
        rig.fetch(client, SlotRef(0, 1, 3584, ODD))
    assert not refusal.value.lost


def test_without_memory_for_a_scratch_the_sender_says_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(nbytes: int, device: str) -> torch.Tensor:
        raise TransportError(f"cannot reserve {nbytes} bytes on {device}")

    monkeypatch.setattr(device_arena, "private_memory", full)
    rig.attach()
    rig.host.fill(0, 1, b"", 8192)
    rig.host.publish(b"one", SlotRef(0, 1, 3584, ODD))
    assert "has ended: cannot reserve 8192 bytes on cuda:1" in sender_ends(rig)


def expect(client: Client, rig: Rig, refs: list[SlotRef]) -> list[torch.Tensor]:
    """Expect transfers; returns where they go."""
    assert isinstance(client, Receiver)
    intos = [rig.destination(ref.nbytes) for ref in refs]
    for ref, into in zip(refs, intos, strict=True):
        client.expect(ref, into)
    return intos


def test_receives_are_posted_ahead_as_far_as_the_window_goes(rig: Rig) -> None:
    client = rig.attach()
    refs = [SlotRef(count % 3, 1, 1000 + count) for count in range(WINDOW + 2)]
    for slot in range(3):
        rig.host.fill(slot, 1, b"%d" % slot, 8192)
    NCCL.launches.clear()
    intos = expect(client, rig, refs)
    assert NCCL.launches[1] == WINDOW
    for index, (ref, into) in enumerate(zip(refs, intos, strict=True)):
        rig.host.publish(b"one", ref)
        client.fetch(ref, into, 20.0)
        assert holds(into[: ref.nbytes], b"%d" % ref.slot)
        assert NCCL.launches[1] == min(WINDOW + 1 + index, len(refs)), "the next one is posted as soon as it fits"


def test_a_worker_that_dies_under_expected_transfers_loses_them_all_within_one_deadline(rig: Rig) -> None:
    client = rig.attach()
    rig.host.fill(0, 1, b"alive", 4096)
    refs = [SlotRef(0, 1, 4096)] * 4
    intos = expect(client, rig, refs)
    rig.host.publish(b"one", refs[0])
    client.fetch(refs[0], intos[0], 20.0)
    assert holds(intos[0][:4096], b"alive")
    rig.host.drop(b"one")  # its communicator is aborted; as after SIGKILL, nobody tells the trainer's
    begin = time.monotonic()
    for ref, into in zip(refs[1:], intos[1:], strict=True):
        with pytest.raises(TransportError, match="was lost: receiving 4096 bytes took longer") as loss:
            client.fetch(ref, into, 0.3)
        assert loss.value.lost
    assert time.monotonic() - begin < 2
    expect(client, rig, refs)
    with pytest.raises(TransportError, match="was lost"):
        client.fetch(refs[0], intos[0], 20.0)


def test_a_trainer_that_dies_with_receives_posted_costs_its_sender(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nccl_sender, "SEND_S", 0.3)
    client, other = rig.attach(b"one"), rig.attach(b"two")
    rig.host.fill(0, 1, b"both", 4096)
    ref = SlotRef(0, 1, 4096)
    expect(client, rig, [ref] * 3)
    client.close()  # its communicator is aborted; as after SIGKILL, nobody tells the worker's
    for _ in range(3):
        rig.host.publish(b"one", ref)
    assert holds(rig.fetch(other, ref, b"two"), b"both")
    assert "was not taken within 0.3 s" in sender_ends(rig)
    assert holds(rig.fetch(other, ref, b"two"), b"both")


def test_a_receive_that_cannot_be_posted_is_told_by_the_fetch(rig: Rig) -> None:
    client = rig.attach()
    list(NCCL.pairs.values())[-1].state = REMOTE_ERROR
    (into,) = expect(client, rig, [SlotRef(0, 1, 4096)])
    with pytest.raises(TransportError, match="state 6; the peer may be gone") as loss:
        client.fetch(SlotRef(0, 1, 4096), into, 20.0)
    assert loss.value.lost


def test_all_that_is_expected_is_kept_from_others_when_an_abort_hangs(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nccl_comm, "ABORT_S", 0.1)
    monkeypatch.setattr(nccl_comm, "_quarantine", [])
    client = rig.attach()
    refs = [SlotRef(0, 1, 100), SlotRef(1, 1, 100)]
    intos = expect(client, rig, refs)
    NCCL.hang.set()
    with pytest.raises(TransportError):
        client.fetch(refs[0], intos[0], 0.05)
    (kept,) = nccl_comm._quarantine
    assert isinstance(kept, tuple)
    assert [coming.into.data_ptr() for coming in kept[1][1]] == [into.data_ptr() for into in intos]


def test_a_fetch_is_cancelled_at_once_however_long_the_abort_takes(rig: Rig) -> None:
    client = rig.attach()
    (into,) = expect(client, rig, [SlotRef(0, 1, 100)])
    outcome: list[bool] = []

    def wait() -> None:
        with pytest.raises(TransportError, match="was cancelled") as loss:
            client.fetch(SlotRef(0, 1, 100), into, 60.0)
        outcome.append(loss.value.lost)

    NCCL.hang.set()
    waiter = threading.Thread(target=wait)
    waiter.start()
    assert isinstance(client, Receiver)
    client.cancel()
    assert waiter.is_alive(), "it waits for the abort, and nobody else does"
    NCCL.hang.clear()
    waiter.join(20)
    assert outcome == [True]


def test_a_worker_that_is_gone_does_not_block_other_daemons_batches(rig: Rig) -> None:
    """A receive does not notice that its peer died; `retire`, at the session's end, cancels it."""
    lost, live = (cast(Session, SimpleNamespace(client=rig.attach(key))) for key in (b"one", b"two"))
    rig.host.fill(0, 1, b"live", 4096)
    ended: queue.SimpleQueue[tuple[Item, torch.Tensor | TransportError]] = queue.SimpleQueue()
    waits = threading.Event()

    def begin(item: Item, session: Session) -> SlotRef:
        waits.set()
        return SlotRef(0, 1, 4096)

    def end(item: Item, outcome: torch.Tensor | TransportError, seconds: float) -> None:
        ended.put((item, outcome))

    fetcher = Fetcher("cpu", 3, begin, end, Guard(threading.Condition()))
    rig.host.drop(b"one")  # aborts its end of the communicator; as after SIGKILL, the trainer's end does not notice
    rig.host.publish(b"two", SlotRef(0, 1, 4096))
    items = [cast(Item, SimpleNamespace(layout=SimpleNamespace(nbytes=4096), borrowed=False)) for _ in range(3)]
    for item, session in zip(items, (lost, lost, live), strict=True):
        fetcher.fetch(item, session)
    assert waits.wait(20)
    fetcher.retire(lost)
    for expected in items[:2]:
        item, outcome = ended.get(timeout=10)
        assert item is expected
        assert isinstance(outcome, TransportError)
        assert outcome.lost
    item, outcome = ended.get(timeout=10)
    assert item is items[2]
    assert isinstance(outcome, torch.Tensor)
    assert holds(outcome[:4096], b"live")
    fetcher.close()


def test_the_benchmark_streams_with_receives_posted_ahead(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    client = rig.attach()
    done: list[str] = []

    def noted(name: str, method: Callable[..., None], *args: object) -> None:
        done.append(name)
        method(*args)

    for name in ("expect", "fetch"):
        monkeypatch.setattr(client, name, partial(noted, name, getattr(client, name)))
    for slot in range(3):
        rig.host.fill(slot, 1, b"%d" % slot, 4096)
    served: Any = SimpleNamespace(transport=FakeTransport, host=rig.host, ref=lambda slot, size: SlotRef(slot, 1, size))
    wire = wires.Wire(served, client, b"one", [rig.destination(4096) for _ in range(3)])
    wire.stream(4096, 5)
    assert done == ["expect"] * 3 + ["fetch", "expect"] * 2 + ["fetch"] * 3
    assert all(holds(wire.fetched(slot, 4096), b"%d" % slot) for slot in range(3))
