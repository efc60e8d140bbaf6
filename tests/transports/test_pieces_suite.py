"""The suite's part about pieces finds a transport that cuts wrong; those that cut right pass it in their own tests."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import pytest
import torch

from specd.transports.base import SlotRef, Transport
from specd.transports.inproc import Inproc, InprocClient
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.pieces_suite import PiecesConformance
from specd.transports.testing.rig import Rig


class Shifts(InprocClient):
    """Takes the layer beside each that is wanted."""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        pieces = tuple(piece._replace(source=piece.source + 400 * (piece.rows > 1)) for piece in ref.pieces)
        super().fetch(ref._replace(pieces=pieces), into, deadline_s)


class Astray(InprocClient):
    """Counts from where the destination's memory begins, not from where the destination does."""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        whole = into.new_empty(0).set_(into.untyped_storage())
        super().fetch(ref, whole, deadline_s)


class Leaks(InprocClient):
    """Sends what another batch left between two tensors."""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        into[: ref.nbytes] = 7
        super().fetch(ref, into, deadline_s)


class Suite(PiecesConformance):
    __test__ = False
    slot_bytes: ClassVar[int] = 9 << 20

    def __init__(self, client: type[InprocClient]) -> None:
        class Faulty(Inproc):
            @staticmethod
            def client(device: str) -> InprocClient:
                return client()

        self.transport: type[Transport] = Faulty  # type: ignore[misc]

    def host(self) -> Host:
        return LocalHost(self.transport, 3, self.slot_bytes)


@pytest.mark.parametrize(
    ("client", "finding"),
    [(InprocClient, ""), (Shifts, "taps arrived wrong"), (Astray, "wrote before"), (Leaks, "something else came")],
)
def test_a_wrong_cut_is_found(client: type[InprocClient], finding: str) -> None:
    suite = Suite(client)
    expected = pytest.raises(AssertionError, match=finding) if finding else contextlib.nullcontext()
    with contextlib.closing(Rig(suite.transport, "cpu", suite.host())) as rig, expected:
        suite.test_pieces_of_a_slot_are_cut_out_and_packed(rig)
