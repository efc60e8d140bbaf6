"""The suite every transport must pass: subclass `TransportConformance` in a pytest module and name the transport.

from specd.transports.testing.suite import TransportConformance

class TestMine(TransportConformance):
    transport = Mine
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterator
from typing import ClassVar

from specd.errors import TransportError, missing_extra
from specd.memory.segment import segment_path
from specd.transports.base import SlotRef, Traits, Transport
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.pieces_suite import PiecesConformance
from specd.transports.testing.rig import Rig, holds

try:
    import pytest
except ImportError as error:
    raise missing_extra("pytest", "dev") from error

__all__ = ["Rig", "TransportConformance", "holds"]


class TransportConformance(PiecesConformance):
    """Override `host` to serve from elsewhere, for example from another process."""

    transport: ClassVar[type[Transport]]
    device: ClassVar[str] = "cpu"
    num_slots: ClassVar[int] = 3
    slot_bytes: ClassVar[int] = (9 << 20) + 12345
    num_mutants: ClassVar[int] = 100
    """How many altered offers are tried, each of which may be used."""

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes)

    @pytest.fixture
    def rig(self) -> Iterator[Rig]:
        rig = Rig(self.transport, self.device, self.host())
        try:
            yield rig
        finally:
            rig.close()

    def test_traits_and_hello_are_well_formed(self, rig: Rig) -> None:
        assert isinstance(self.transport.traits, Traits)
        client = rig.attach()
        assert isinstance(client.hello(), bytes)
        assert len(client.hello()) <= 4096

    def test_bytes_are_exact_at_every_size(self, rig: Rig) -> None:
        client = rig.attach()
        edges = (1, 2, 63, 4095, 4096, 4097, 65535, 65536, 1 << 20, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 8 << 20)
        for generation, nbytes in enumerate((*edges, self.slot_bytes), start=1):
            nonce = b"%d" % nbytes
            rig.host.fill(0, generation, nonce, nbytes)
            assert holds(rig.fetch(client, SlotRef(0, generation, nbytes)), nonce), f"{nbytes} bytes arrived wrong"

    def test_part_of_a_slot_is_its_beginning(self, rig: Rig) -> None:
        client = rig.attach()
        rig.host.fill(1, 1, b"whole", self.slot_bytes)
        assert holds(rig.fetch(client, SlotRef(1, 1, 1000)), b"whole")

    def test_every_slot_and_large_generations(self, rig: Rig) -> None:
        client = rig.attach()
        refs = [SlotRef(slot, (1 << 63) + slot, 5000) for slot in range(self.num_slots)]
        for ref in refs:
            rig.host.fill(ref.slot, ref.generation, b"%d" % ref.slot, ref.nbytes)
        for ref in reversed(refs):
            assert holds(rig.fetch(client, ref), b"%d" % ref.slot)

    def test_many_transfers_in_a_row(self, rig: Rig) -> None:
        client = rig.attach()
        for generation in range(1, 101):
            slot, nonce = generation % self.num_slots, b"%d" % generation
            rig.host.fill(slot, generation, nonce, 3000)
            assert holds(rig.fetch(client, SlotRef(slot, generation, 3000)), nonce)

    def test_several_announced_before_the_first_is_fetched(self, rig: Rig) -> None:
        client = rig.attach()
        refs = [SlotRef(slot, 1, self.slot_bytes) for slot in range(self.num_slots)]
        for ref in refs:
            rig.host.fill(ref.slot, 1, b"%d" % ref.slot, ref.nbytes)
            rig.publish(b"one", ref)
        for ref in refs:
            into = rig.destination(ref.nbytes)
            client.fetch(ref, into, 20.0)
            assert holds(into[: ref.nbytes], b"%d" % ref.slot)

    def test_announced_again_starts_over(self, rig: Rig) -> None:
        client = rig.attach()
        rig.host.fill(0, 1, b"again", self.slot_bytes)
        ref = SlotRef(0, 1, self.slot_bytes)
        for _ in range(3 if self.transport.traits.abortable else 0):
            rig.publish(b"one", ref)
        assert holds(rig.fetch(client, ref), b"again")
        rig.host.fill(1, 1, b"next", 100)
        assert holds(rig.fetch_after(client, SlotRef(1, 1, 100)), b"next")

    def test_equal_batches_are_all_sent(self, rig: Rig) -> None:
        """Batches of equal content share a slot: each is announced, and each is fetched, by one session or by two."""
        clients = {session: rig.attach(session) for session in (b"one", b"two")}
        other, equal = SlotRef(1, 1, self.slot_bytes), SlotRef(0, 1, self.slot_bytes)
        for ref in (other, equal):
            rig.host.fill(ref.slot, 1, b"%d" % ref.slot, self.slot_bytes)
        order = (other, equal, equal)  # behind the other, so that none is through before the next is announced
        for session in clients:
            for ref in order:
                rig.publish(session, ref)
        for ref in order:
            for client in clients.values():
                into = rig.destination(ref.nbytes)
                client.fetch(ref, into, 5.0)
                assert holds(into[: ref.nbytes], b"%d" % ref.slot)

    def test_another_generation_is_refused(self, rig: Rig) -> None:
        client = rig.attach()
        rig.host.fill(0, 7, b"seven", 4096)
        for generation in (6, 8):
            with pytest.raises(TransportError) as refusal:
                rig.fetch(client, SlotRef(0, generation, 4096), deadline_s=5.0)
            if refusal.value.lost:
                client = rig.revive(client)
        assert holds(rig.fetch(client, SlotRef(0, 7, 4096)), b"seven")

    def test_a_slot_that_is_being_written_is_refused(self, rig: Rig) -> None:
        client = rig.attach()
        rig.host.fill(0, 1, b"old", 4096)
        rig.host.begin(0)
        with pytest.raises(TransportError):
            rig.fetch(client, SlotRef(0, 1, 4096), deadline_s=5.0)

    def test_a_refill_under_way_is_noticed(self, rig: Rig) -> None:
        """Whatever the moment, a fetch gives the bytes of its generation or an error."""
        client = rig.attach()
        rounds = 12
        meet = threading.Barrier(2, timeout=60)
        rig.host.fill(0, 1, b"1", self.slot_bytes)

        def refill() -> None:
            for generation in range(2, rounds + 2):
                meet.wait()
                rig.host.fill(0, generation, b"%d" % generation, self.slot_bytes)
                meet.wait()

        writer = threading.Thread(target=refill)
        writer.start()
        try:
            for generation in range(1, rounds + 1):
                ref = SlotRef(0, generation, self.slot_bytes)
                into, lost = rig.destination(ref.nbytes), False
                rig.publish(b"one", ref)
                meet.wait()
                try:
                    client.fetch(ref, into, 20.0)
                except TransportError as error:
                    lost = error.lost
                else:
                    assert holds(into[: ref.nbytes], b"%d" % generation), "torn bytes were delivered"
                meet.wait()
                if lost:
                    client = rig.revive(client)
        except BaseException:
            meet.abort()
            raise
        finally:
            with contextlib.suppress(threading.BrokenBarrierError):
                writer.join()
        last = SlotRef(0, rounds + 1, self.slot_bytes)
        assert holds(rig.fetch(client, last), b"%d" % last.generation)

    def test_a_ref_outside_the_ring_is_refused(self, rig: Rig) -> None:
        client = rig.attach()
        rig.host.fill(0, 1, b"fine", 100)
        outside = [(-1, 1, 1), (self.num_slots, 1, 1), (0, 0, 1), (0, 1, 0), (0, 1, self.slot_bytes + 1)]
        for ref in (SlotRef(*facts) for facts in outside):
            with pytest.raises(TransportError):
                client.fetch(ref, rig.destination(self.slot_bytes + 1), 1.0)
            if self.transport.traits.needs_recv_ready:
                with pytest.raises(TransportError):
                    rig.host.publish(b"one", ref)
        assert holds(rig.fetch(client, SlotRef(0, 1, 100)), b"fine")

    def test_a_destination_that_is_too_small_is_refused(self, rig: Rig) -> None:
        client = rig.attach()
        rig.host.fill(0, 1, b"", 1000)
        with pytest.raises(TransportError):
            client.fetch(SlotRef(0, 1, 1000), rig.destination(1000)[:999], 1.0)

    def test_the_deadline_holds_when_nothing_is_sent(self, rig: Rig) -> None:
        client = rig.attach()
        rig.host.fill(0, 1, b"late", 4096)
        ref = SlotRef(0, 1, 4096)
        if not self.transport.traits.needs_recv_ready:  # nothing to wait for but the slot itself
            ref = SlotRef(1, 1, 4096)
        into, begin = rig.destination(4096), time.monotonic()
        with pytest.raises(TransportError) as late:
            client.fetch(ref, into, 0.2)
        assert time.monotonic() - begin <= 5.0
        traits = self.transport.traits
        assert late.value.lost == (traits.needs_recv_ready and not traits.abortable)
        if late.value.lost:
            with pytest.raises(TransportError) as again:
                client.fetch(ref, into, 1.0)
            assert again.value.lost, "a lost client stays lost"
        rig.host.fill(1, 1, b"late", 4096)
        assert holds(rig.fetch_after(client, ref), b"late")

    def test_an_abandoned_transfer_does_not_disturb_the_next(self, rig: Rig) -> None:
        client = rig.attach()
        rig.host.fill(0, 1, b"first", self.slot_bytes)
        rig.host.fill(1, 1, b"second", self.slot_bytes)
        rig.publish(b"one", SlotRef(0, 1, self.slot_bytes))
        with contextlib.suppress(TransportError):
            client.fetch(SlotRef(0, 1, self.slot_bytes), rig.destination(self.slot_bytes), 0.001)
        assert holds(rig.fetch_after(client, SlotRef(1, 1, self.slot_bytes)), b"second")

    def test_two_sessions_do_not_disturb_each_other(self, rig: Rig) -> None:
        one, two = rig.attach(b"one"), rig.attach(b"two")
        for generation in range(1, 6):
            rig.host.fill(0, generation, b"a%d" % generation, 100_000)
            rig.host.fill(1, generation, b"b%d" % generation, 5_000_000)
            rig.publish(b"two", SlotRef(1, generation, 5_000_000))
            assert holds(rig.fetch(one, SlotRef(0, generation, 100_000), b"one"), b"a%d" % generation)
            into = rig.destination(5_000_000)
            two.fetch(SlotRef(1, generation, 5_000_000), into, 20.0)
            assert holds(into[:5_000_000], b"b%d" % generation)
        rig.host.drop(b"two")
        assert holds(rig.fetch(one, SlotRef(0, 5, 100_000), b"one"), b"a5")

    def test_a_trainer_that_takes_nothing_delays_nobody(self, rig: Rig) -> None:
        rig.attach(b"idle")
        busy = rig.attach(b"busy")
        rig.host.fill(0, 1, b"shared", self.slot_bytes)
        ref = SlotRef(0, 1, self.slot_bytes)
        for _ in range(50 if self.transport.traits.abortable else self.num_slots):
            rig.publish(b"idle", ref)
        assert holds(rig.fetch(busy, ref, b"busy"), b"shared")

    def test_a_dropped_session_gets_nothing(self, rig: Rig) -> None:
        client = rig.attach()
        rig.host.fill(0, 1, b"mine", 4096)
        rig.host.drop(b"one")
        rig.host.drop(b"nobody")
        rig.host.begin(0)
        with pytest.raises(TransportError):
            rig.fetch(client, SlotRef(0, 1, 4096), deadline_s=0.3)

    def test_a_session_can_be_accepted_again(self, rig: Rig) -> None:
        rig.attach().close()
        rig.host.drop(b"one")
        rig.attach()
        client = rig.attach()
        rig.host.fill(0, 1, b"back", 4096)
        assert holds(rig.fetch(client, SlotRef(0, 1, 4096)), b"back")

    def test_garbage_is_refused(self, rig: Rig) -> None:
        rng = random.Random(0)
        client = rig.attach()
        offer = rig.host.accept(b"one", client.hello())
        for _ in range(50):
            with pytest.raises(TransportError):
                rig.host.accept(b"evil", b"\xc1" + rng.randbytes(rng.randrange(1, 200)))
            with pytest.raises(TransportError):
                client.attach(b"\xc1" + rng.randbytes(rng.randrange(0, 200)), 0.01)
        for length in range(len(offer)):
            with pytest.raises(TransportError):
                client.attach(offer[:length], 0.01)
        for _ in range(self.num_mutants):
            mutant = bytearray(offer)
            mutant[rng.randrange(len(offer))] = rng.randrange(256)
            with contextlib.suppress(TransportError):
                client.attach(bytes(mutant), 0.01)
        client.attach(rig.host.accept(b"one", client.hello()), 20.0)
        rig.host.fill(0, 1, b"fine", 4096)
        assert holds(rig.fetch(client, SlotRef(0, 1, 4096)), b"fine")

    def test_what_is_cancelled_fails_as_lost(self, rig: Rig) -> None:
        client = rig.attach()
        rig.host.fill(1, 1, b"", 100)
        outcome: list[bool] = []

        def wait() -> None:
            with pytest.raises(TransportError) as loss:
                client.fetch(SlotRef(0, 1, 100), rig.destination(100), 60.0)
            outcome.append(loss.value.lost)

        waiter = threading.Thread(target=wait)
        waiter.start()
        client.cancel()
        client.cancel()
        waiter.join(5)
        # Where there is nothing to wait for, it may have failed before, as it was never filled.
        assert outcome == [True] or (outcome and not self.transport.traits.needs_recv_ready)
        rig.publish(b"one", SlotRef(1, 1, 100))
        with pytest.raises(TransportError) as late:
            client.fetch(SlotRef(1, 1, 100), rig.destination(100), 60.0)
        assert late.value.lost
        with pytest.raises(TransportError):
            client.attach(rig.host.accept(b"two", client.hello()), 60.0)
        client.close()
        client.cancel()
        again = rig.attach(b"three")
        assert holds(rig.fetch(again, SlotRef(1, 1, 100), b"three"), b"")

    def test_close_is_idempotent_and_final(self, rig: Rig) -> None:
        never = self.transport.client(self.device)
        never.close()
        never.close()
        client = rig.attach()
        rig.host.fill(0, 1, b"", 100)
        client.close()
        client.close()
        with pytest.raises(TransportError):
            client.fetch(SlotRef(0, 1, 100), rig.destination(100), 1.0)
        rig.host.close()
        rig.host.close()

    def test_close_ends_a_fetch_that_waits(self, rig: Rig) -> None:
        client = rig.attach()
        outcome: list[str] = []

        def wait() -> None:
            try:
                client.fetch(SlotRef(0, 1, 100), rig.destination(100), 60.0)
            except TransportError as error:
                outcome.append(str(error))

        waiter = threading.Thread(target=wait)
        waiter.start()
        client.close()
        waiter.join(10)
        assert len(outcome) == 1

    def test_nothing_is_left_behind(self) -> None:
        def cycle() -> str:
            rig = Rig(self.transport, self.device, self.host())
            try:
                client = rig.attach()
                rig.host.fill(0, 1, b"", self.slot_bytes)
                rig.fetch(client, SlotRef(0, 1, self.slot_bytes))
                return str(getattr(rig.host, "epoch", ""))
            finally:
                rig.close()

        cycle()  # libraries start threads and open files of their own the first time
        count = 4
        threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
        epochs = [cycle() for _ in range(count)]
        # Less than one a cycle: what another test left may end meanwhile, and a library may still fill a cache.
        assert threading.active_count() - threads < count, "threads are left"
        assert len(os.listdir("/proc/self/fd")) - files < count, "open files are left"
        assert not [epoch for epoch in epochs if epoch and os.path.exists(segment_path(epoch))], "a segment is left"
