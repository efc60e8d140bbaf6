"""The conformance suite for a transport whose client is a `Borrower`: slots are read in place."""

from __future__ import annotations

from typing import cast

from specd.errors import TransportError, missing_extra
from specd.protocol.cut import Piece
from specd.transports.base import Borrower, SlotRef
from specd.transports.testing.suite import Rig, TransportConformance, holds

try:
    import pytest
except ImportError as error:
    raise missing_extra("pytest", "dev") from error


class BorrowConformance(TransportConformance):
    """The suite for a transport whose client is a Borrower, with the arena on the client's device."""

    def test_a_view_is_the_slot_itself(self, rig: Rig) -> None:
        import torch

        client = cast(Borrower, rig.attach())
        rig.host.fill(1, 1, b"first", self.slot_bytes)
        view = client.view(SlotRef(1, 1, self.slot_bytes))
        assert (view.dtype, view.shape) == (torch.uint8, (self.slot_bytes,))
        assert view.device == rig.destination(1).device
        assert holds(view, b"first")
        rig.host.fill(1, 2, b"second", self.slot_bytes)
        assert holds(view, b"second"), "the view is a copy"
        assert client.view(SlotRef(1, 2, 100)).data_ptr() == view.data_ptr()

    def test_a_view_of_pieces_is_of_one_stretch_of_the_slot(self, rig: Rig) -> None:
        client = cast(Borrower, rig.attach())
        rig.host.fill(0, 1, b"all", self.slot_bytes)
        whole = client.view(SlotRef(0, 1, self.slot_bytes))
        view = client.view(SlotRef(0, 1, 5000, (Piece(4096, 0, 1, 5000, 5000, 5000),)))
        assert (view.data_ptr(), view.numel()) == (whole.data_ptr() + 4096, 5000)
        for pieces in (
            (Piece(0, 0, 10, 50, 100, 50),),
            (Piece(0, 0, 1, 400, 400, 400), Piece(800, 400, 1, 100, 100, 100)),
        ):
            with pytest.raises(TransportError, match="have to be copied"):
                client.view(SlotRef(0, 1, 500, pieces))

    def test_a_view_of_what_the_slot_does_not_hold_is_refused(self, rig: Rig) -> None:
        client = cast(Borrower, rig.attach())
        rig.host.fill(0, 2, b"", 100)
        outside = [(-1, 2, 1), (self.num_slots, 2, 1), (0, 2, 0), (0, 2, self.slot_bytes + 1)]
        for facts in [(0, 1, 100), (0, 3, 100), (1, 1, 100), *outside]:
            with pytest.raises(TransportError):
                client.view(SlotRef(*facts))
        rig.host.begin(0)
        with pytest.raises(TransportError):
            client.view(SlotRef(0, 2, 100))
        client.close()
        with pytest.raises(TransportError):
            client.view(SlotRef(0, 2, 100))
