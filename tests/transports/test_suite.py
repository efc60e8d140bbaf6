"""The conformance suite finds what it should: each fault of a transport fails the test that is for it."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from specd.errors import TransportError
from specd.memory.arena import Arena
from specd.transports.base import ServerContext, SlotRef
from specd.transports.bytes.client import BytesClient
from specd.transports.bytes.server import Bytes, BytesServer
from specd.transports.inproc import Inproc, InprocClient
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.rig import Rig
from specd.transports.testing.suite import TransportConformance


class Flips(InprocClient):
    """Delivers one wrong bit."""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        super().fetch(ref, into, deadline_s)
        into[ref.nbytes - 1] ^= 1


class Spills(InprocClient):
    """Writes behind the bytes that were asked for."""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        super().fetch(ref, into, deadline_s)
        into[ref.nbytes] = 0


class Blind(InprocClient):
    """Delivers whatever the slot holds."""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        super().fetch(ref._replace(generation=7), into, deadline_s)


class Stays(InprocClient):
    """Goes on after its close."""

    def close(self) -> None:
        pass


class Stubborn(InprocClient):
    """Cannot be cancelled."""

    def cancel(self) -> None:
        pass


class Joins(BytesServer):
    """Makes one transfer of two that are of the same slot and generation. own: of one session, else of two."""

    own: bool

    def _on_publish(self, session: bytes, ref: SlotRef) -> None:
        for token, peer in self._peers.items():
            if (token == self._tokens[session]) == self.own:
                for transfer in [old for old in peer.transfers if old.ref == ref]:
                    peer.cancel(transfer.number)
        super()._on_publish(session, ref)


class Litters(InprocClient):
    """Leaves a thread behind."""

    end = threading.Event()

    def __init__(self) -> None:
        super().__init__()
        threading.Thread(target=self.end.wait, daemon=True).start()


class Suite(TransportConformance):
    __test__ = False

    def __init__(self, client: type[InprocClient]) -> None:
        class Faulty(Inproc):
            @staticmethod
            def client(device: str) -> InprocClient:
                return client()

        self.transport = Faulty  # type: ignore[misc]

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes)


@pytest.mark.parametrize(
    ("client", "test", "finding"),
    [
        (Flips, "test_bytes_are_exact_at_every_size", "1 bytes arrived wrong"),
        (Spills, "test_part_of_a_slot_is_its_beginning", "wrote behind the destination"),
        (Blind, "test_another_generation_is_refused", "DID NOT RAISE"),
        (Stays, "test_close_is_idempotent_and_final", "DID NOT RAISE"),
        (Stubborn, "test_what_is_cancelled_fails_as_lost", "DID NOT RAISE"),
    ],
)
def test_a_fault_fails_the_test_that_is_for_it(client: type[InprocClient], test: str, finding: str) -> None:
    sound, faulty = Suite(InprocClient), Suite(client)
    with contextlib.closing(Rig(sound.transport, "cpu", sound.host())) as rig:
        getattr(sound, test)(rig)
    found = pytest.raises((AssertionError, pytest.fail.Exception), match=finding)
    with contextlib.closing(Rig(faulty.transport, "cpu", faulty.host())) as rig, found:
        getattr(faulty, test)(rig)


@pytest.mark.parametrize("own", [True, False], ids=["of one session", "of two sessions"])
def test_a_transport_that_joins_equal_batches_is_found(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Joining(Bytes):
        @staticmethod
        def server(arena: Arena, context: ServerContext) -> BytesServer:
            server = Joins(arena.ledger, context)
            server.own = own
            return server

    fetch = BytesClient.fetch
    monkeypatch.setattr(BytesClient, "fetch", lambda client, ref, into, deadline_s: fetch(client, ref, into, 0.5))
    for transport, finding in ((Bytes, contextlib.nullcontext()), (Joining, pytest.raises(TransportError))):
        suite = Suite(InprocClient)
        suite.transport = transport  # type: ignore[misc]
        with contextlib.closing(Rig(transport, "cpu", suite.host())) as rig, finding:
            suite.test_equal_batches_are_all_sent(rig)


def test_a_thread_that_is_left_behind_is_found() -> None:
    Suite(InprocClient).test_nothing_is_left_behind()
    try:
        with pytest.raises(AssertionError, match="threads are left"):
            Suite(Litters).test_nothing_is_left_behind()
    finally:
        Litters.end.set()
