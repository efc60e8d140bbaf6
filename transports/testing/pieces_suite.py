"""The part of the conformance suite about pieces: what a trainer wants of a slot that holds more."""

from __future__ import annotations

from typing import ClassVar

from specd.errors import TransportError, missing_extra
from specd.protocol.batch import slot_layout
from specd.protocol.capture import FP8, CaptureSpec
from specd.protocol.cut import Piece, cut, gather
from specd.transports.base import SlotRef, Transport
from specd.transports.checks import pattern
from specd.transports.testing.rig import GUARD, Rig, holds

try:
    import pytest
except ImportError as error:
    raise missing_extra("pytest", "dev") from error

OFFSET = 4096
"""Where in a larger buffer pieces go."""
CUTS = (
    CaptureSpec(taps=(1,)), CaptureSpec(taps=(0, 2, 3)), CaptureSpec(taps=(1, 2), final=True),
    CaptureSpec(taps=(0, 1, 2, 3)), CaptureSpec(taps=(), final=True), CaptureSpec(taps=(0, 2), final=True, dtype=FP8),
)  # fmt: skip
"""What is cut out of four taps and the final states, of the same dtype."""


class PiecesConformance:
    """For `TransportConformance`: whether pieces arrive right, or, without the trait `cuts`, are refused."""

    transport: ClassVar[type[Transport]]
    slot_bytes: ClassVar[int]

    def test_pieces_of_a_slot_are_cut_out_and_packed(self, rig: Rig) -> None:
        """What a trainer wants of a slot that holds more, also at home in a part of a larger buffer."""
        if not self.transport.traits.cuts:
            pytest.skip(f"{self.transport.__name__} takes no pieces (traits.cuts)")
        client = rig.attach()
        for generation, own in enumerate(CUTS, start=1):
            held, hidden, tokens = CaptureSpec(taps=(0, 1, 2, 3), final=True, dtype=own.dtype), 200, 4000
            slot = slot_layout(held, hidden, tokens).nbytes
            rig.host.fill(1, generation, b"%d" % generation, slot)
            layout, pieces = slot_layout(own, hidden, tokens), cut(held, own, hidden, tokens)
            expected = bytes(gather(pattern(b"%d" % generation, slot).data, pieces, 0, layout.nbytes))
            ref = SlotRef(1, generation, layout.nbytes, pieces)
            whole = rig.destination(ref.nbytes + OFFSET)
            rig.publish(b"one", ref)
            client.fetch(ref, whole[OFFSET:], 20.0)
            found, last = bytes(whole.cpu().numpy()), 0
            assert found[:OFFSET] == bytes([0xA5]) * OFFSET, "wrote before the destination"
            assert found[OFFSET + ref.nbytes :] == bytes([0xA5]) * GUARD, "wrote behind the destination"
            for tensor in layout.tensors:
                at, end = tensor.offset, tensor.offset + tensor.nbytes
                assert found[OFFSET + at : OFFSET + end] == expected[at:end], f"{own}: {tensor.name} arrived wrong"
                assert set(found[OFFSET + last : OFFSET + at]) <= {0, 0xA5}, f"{own}: something else came before it"
                last = end
        rig.host.fill(0, 1, b"whole", 5000)
        assert holds(rig.fetch(client, SlotRef(0, 1, 5000)), b"whole")

    def test_pieces_outside_the_slot_are_refused(self, rig: Rig) -> None:
        if not self.transport.traits.cuts:
            pytest.skip(f"{self.transport.__name__} takes no pieces (traits.cuts)")
        client = rig.attach()
        rig.host.fill(0, 1, b"fine", self.slot_bytes)
        for piece in (
            Piece(self.slot_bytes - 99, 0, 1, 100, 100, 100), Piece(-1, 0, 1, 100, 100, 100),
            Piece(0, 1, 1, 100, 100, 100),
            Piece(0, 0, 3, 40, 40, 40), Piece(0, 0, 2, 50, 49, 50), Piece(0, 0, 2, 50, 50, 49), Piece(0, 0, 0, 1, 1, 1),
        ):  # fmt: skip
            with pytest.raises(TransportError):
                client.fetch(SlotRef(0, 1, 100, (piece,)), rig.destination(100), 1.0)
        assert holds(rig.fetch(client, SlotRef(0, 1, 100)), b"fine")

    def test_pieces_are_refused_where_they_cannot_be_taken(self, rig: Rig) -> None:
        if self.transport.traits.cuts:
            pytest.skip(f"{self.transport.__name__} takes pieces (traits.cuts)")
        client = rig.attach()
        rig.host.fill(0, 1, b"fine", 1000)
        with pytest.raises(TransportError):
            client.fetch(SlotRef(0, 1, 100, (Piece(50, 0, 1, 100, 100, 100),)), rig.destination(100), 1.0)
