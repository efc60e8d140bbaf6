"""The conformance suite for a transport whose client is a `Receiver`: several transfers in flight."""

from __future__ import annotations

import threading
import time

from specd.errors import TransportError, missing_extra
from specd.protocol.cut import Piece, gather
from specd.transports.base import Receiver, SlotRef
from specd.transports.checks import pattern
from specd.transports.testing.suite import Rig, TransportConformance, holds

try:
    import pytest
except ImportError as error:
    raise missing_extra("pytest", "dev") from error


class ReceiverConformance(TransportConformance):
    """The suite for a transport whose client is a Receiver: subclass it in place of `TransportConformance`."""

    def test_any_number_is_expected_and_fetched_in_order(self, rig: Rig) -> None:
        client = self._receiver(rig)
        refs = [SlotRef(count % self.num_slots, 1, self.slot_bytes - count) for count in range(20)]
        for slot in range(self.num_slots):
            rig.host.fill(slot, 1, b"%d" % slot, self.slot_bytes)
        intos = [rig.destination(ref.nbytes) for ref in refs]
        for ref, into in zip(refs[:10], intos, strict=False):
            client.expect(ref, into)
            rig.publish(b"one", ref)
            if ref is refs[4]:  # as soon as a buffer is free, the next one is expected
                client.fetch(refs[0], intos[0], 20.0)
        for done, (ref, into) in enumerate(zip(refs, intos, strict=True)):
            if done:
                client.fetch(ref, into, 20.0)
            assert holds(into[: ref.nbytes], b"%d" % ref.slot)
            assert bool((into[ref.nbytes :] == 0xA5).all()), "wrote behind the destination"
            if done < 10:
                rig.publish(b"one", refs[done + 10])
                client.expect(refs[done + 10], intos[done + 10])

    def test_an_expected_transfer_is_made_before_it_is_fetched(self, rig: Rig) -> None:
        client = self._receiver(rig)
        rig.host.fill(0, 1, b"early", 4096)
        ref, into = SlotRef(0, 1, 4096), rig.destination(4096)
        client.expect(ref, into)
        rig.publish(b"one", ref)
        limit = time.monotonic() + 20
        while not holds(into[:4096], b"early"):
            assert time.monotonic() < limit, "it waits for the fetch"
            time.sleep(0.001)
        client.fetch(ref, into, 20.0)
        assert holds(into[:4096], b"early")
        assert holds(rig.fetch(client, ref), b"early"), "none is expected any more"

    def test_pieces_of_expected_slots_are_cut_in_order(self, rig: Rig) -> None:
        if not self.transport.traits.cuts:
            pytest.skip(f"{self.transport.__name__} takes no pieces (traits.cuts)")
        client = self._receiver(rig)
        pieces = (Piece(4096, 0, 900, 96, 512, 192), Piece(4096 + 256, 96, 900, 96, 512, 192))
        refs = [SlotRef(slot, 1, 900 * 192, pieces) for slot in range(self.num_slots)]
        intos = [rig.destination(ref.nbytes) for ref in refs]
        for ref, into in zip(refs, intos, strict=True):
            rig.host.fill(ref.slot, 1, b"%d" % ref.slot, 500_000)
            client.expect(ref, into)
            rig.publish(b"one", ref)
        for ref, into in zip(refs, intos, strict=True):
            client.fetch(ref, into, 20.0)
            expected = gather(pattern(b"%d" % ref.slot, 500_000).data, pieces, 0, ref.nbytes)
            assert bytes(into[: ref.nbytes].cpu().numpy()) == bytes(expected), "another slot's states, or torn ones"

    def test_a_stale_slot_among_expected_ones_costs_nobody_else(self, rig: Rig) -> None:
        client = self._receiver(rig)
        refs = [SlotRef(slot, 1, 5000) for slot in range(3)]
        for ref in refs:
            rig.host.fill(ref.slot, 2 if ref.slot == 1 else 1, b"%d" % ref.slot, ref.nbytes)
        intos = [rig.destination(ref.nbytes) for ref in refs]
        for ref, into in zip(refs, intos, strict=True):
            client.expect(ref, into)
            rig.publish(b"one", ref)
        for ref, into in zip(refs, intos, strict=True):
            if ref.slot == 1:
                with pytest.raises(TransportError) as refusal:
                    client.fetch(ref, into, 20.0)
                assert not refusal.value.lost
            else:
                client.fetch(ref, into, 20.0)
                assert holds(into[: ref.nbytes], b"%d" % ref.slot)

    def test_what_cannot_be_expected_is_refused_by_the_fetch(self, rig: Rig) -> None:
        client = self._receiver(rig)
        rig.host.fill(0, 1, b"fine", 100)
        small = rig.destination(100)[:99]
        for ref, into in (
            (SlotRef(self.num_slots, 1, 1), rig.destination(1)),
            (SlotRef(0, 1, self.slot_bytes + 1), rig.destination(self.slot_bytes + 1)),
            (SlotRef(0, 1, 100), small),
        ):
            client.expect(ref, into)
            with pytest.raises(TransportError) as refusal:
                client.fetch(ref, into, 1.0)
            assert not refusal.value.lost
        assert holds(rig.fetch(client, SlotRef(0, 1, 100)), b"fine")

    @pytest.mark.parametrize("wrong", ["slot", "destination"])
    def test_a_fetch_of_another_than_expected_is_refused(self, rig: Rig, wrong: str) -> None:
        client = self._receiver(rig)
        refs = [SlotRef(slot, 1, 4096) for slot in range(2)]
        intos = [rig.destination(4096) for _ in refs]
        for ref, into in zip(refs, intos, strict=True):
            rig.host.fill(ref.slot, 1, b"%d" % ref.slot, 4096)
            client.expect(ref, into)
            rig.publish(b"one", ref)
        with pytest.raises(TransportError):
            client.fetch(refs[wrong == "slot"], intos[1], 20.0)
        assert holds(rig.fetch_after(client, refs[1]), b"1")

    def test_the_deadline_of_one_is_the_end_of_all_that_are_expected(self, rig: Rig) -> None:
        client = self._receiver(rig)
        rig.host.fill(0, 1, b"late", 4096)
        ref, intos = SlotRef(0, 1, 4096), [rig.destination(4096) for _ in range(3)]
        for into in intos:
            client.expect(ref, into)
        begin = time.monotonic()
        for into in intos:
            with pytest.raises(TransportError) as late:
                client.fetch(ref, into, 0.2)
            assert late.value.lost == (not self.transport.traits.abortable)
        assert time.monotonic() - begin <= 5.0
        assert holds(rig.fetch_after(client, ref), b"late")

    def test_close_ends_what_is_expected(self, rig: Rig) -> None:
        client = self._receiver(rig)
        ref, into = SlotRef(0, 1, 4096), rig.destination(4096)
        for _ in range(2):
            client.expect(ref, into)
        client.close()
        client.expect(ref, into)
        with pytest.raises(TransportError):
            client.fetch(ref, into, 1.0)
        again = rig.attach(b"two")
        rig.host.fill(0, 1, b"next", 4096)
        assert holds(rig.fetch(again, ref, b"two"), b"next")

    def test_what_waits_is_cancelled_and_lost(self, rig: Rig) -> None:
        client = self._receiver(rig)
        ref, intos = SlotRef(0, 1, 4096), [rig.destination(4096) for _ in range(3)]
        for into in intos:
            client.expect(ref, into)
        outcome: list[bool] = []

        def wait() -> None:
            for into in intos:
                with pytest.raises(TransportError) as loss:
                    client.fetch(ref, into, 60.0)
                outcome.append(loss.value.lost)

        waiter = threading.Thread(target=wait)
        waiter.start()
        client.cancel()
        client.cancel()
        waiter.join(20)
        assert outcome == [True] * 3
        client.expect(ref, intos[0])
        with pytest.raises(TransportError) as late:
            client.fetch(ref, intos[0], 60.0)
        assert late.value.lost
        client.close()
        again = rig.attach(b"two")
        rig.host.fill(0, 1, b"next", 4096)
        assert holds(rig.fetch(again, ref, b"two"), b"next")

    def test_to_attach_anew_forgets_what_was_expected(self, rig: Rig) -> None:
        client = self._receiver(rig)
        rig.host.fill(0, 1, b"anew", 4096)
        client.expect(SlotRef(1, 1, 4096), rig.destination(4096))
        client.attach(rig.host.accept(b"one", client.hello()), 20.0)
        assert holds(rig.fetch(client, SlotRef(0, 1, 4096)), b"anew")

    @staticmethod
    def _receiver(rig: Rig) -> Receiver:
        client = rig.attach()
        assert isinstance(client, Receiver)
        return client
