"""Wires bring what a ring holds, and notice when they do not."""

from __future__ import annotations

import contextlib

import pytest
import torch

from specd.bench.transport import wires
from specd.bench.transport.lanes import Lane, placements
from specd.bench.transport.served import Patterns, Served
from specd.transports.base import SlotRef
from specd.transports.inproc import Inproc, InprocClient

LANE = Lane("inproc", Inproc.traits, placements("cpu", 0)[0])


def test_a_wire_brings_what_its_ring_holds() -> None:
    patterns = Patterns()
    with contextlib.closing(Served("inproc", "cpu", 2, 4096, patterns)) as served:
        assert served.daemon_cpu_s() == 0.0, "it is this process, whose seconds are the trainer's"
        with wires.wire(served, LANE, b"one") as wire:
            assert wire.setup_ms > 0
            assert min(wire.one(1000), wire.stream(1000, 5)) > 0
            assert wire.moved == 6000
            for slot in (0, 1):
                assert torch.equal(wire.fetched(slot, 1000), patterns.expected(slot, 1000, "cpu"))
            assert wires.verified(wire, served, patterns, 1000, "cpu", 2)
            wires.clear(wire, 1000, "cpu")
            assert not wires.verified(wire, served, patterns, 1000, "cpu", 2)
            wire.stream(1000, 2)
            assert not wires.verified(wire, served, Patterns(), 1000, "cpu", 1), "other bytes than expected"


class Lender(InprocClient):
    """A client that lends what it fetched."""

    def view(self, ref: SlotRef) -> torch.Tensor:
        into = torch.empty(ref.nbytes, dtype=torch.uint8)
        self.fetch(ref, into, 1.0)
        return into


def test_a_borrowed_slot_is_read_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = Patterns()
    monkeypatch.setattr(Inproc, "client", staticmethod(lambda device: Lender()))
    with (
        contextlib.closing(Served("inproc", "cpu", 1, 4096, patterns)) as served,
        wires.wire(served, LANE._replace(borrow=True), b"one") as wire,
    ):
        assert [into.numel() for into in wire.into] == [0]
        wire.one(1000)
        assert wires.verified(wire, served, patterns, 1000, "cpu", 1)
