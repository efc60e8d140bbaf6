"""A rig: what it announces, what it finds behind a destination, and a lost client that is attached anew."""

from __future__ import annotations

import contextlib

import pytest
import torch

from specd.errors import TransportError
from specd.transports.base import SlotRef
from specd.transports.inproc import Inproc, InprocClient
from specd.transports.testing.hosts import LocalHost
from specd.transports.testing.rig import GUARD, Rig, holds


class Loses(InprocClient):
    """Its first fetch costs the client."""

    fetched = False

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        if not Loses.fetched:
            Loses.fetched = True
            raise TransportError("the connection was lost", lost=True)
        super().fetch(ref, into, deadline_s)


class Losing(Inproc):
    @staticmethod
    def client(device: str) -> Loses:
        return Loses()


def test_a_lost_client_is_attached_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loses, "fetched", False)
    with contextlib.closing(Rig(Losing, "cpu", LocalHost(Losing, 1, 4096))) as rig:
        client = rig.attach()
        rig.host.fill(0, 1, b"again", 4096)
        with pytest.raises(AssertionError, match="an abortable transport lost its client"):
            rig.fetch_after(client, SlotRef(0, 1, 4096))
        assert holds(rig.fetch(client, SlotRef(0, 1, 4096)), b"again")


def test_a_destination_is_guarded() -> None:
    with contextlib.closing(Rig(Inproc, "cpu", LocalHost(Inproc, 1, 4096))) as rig:
        into = rig.destination(100)
        assert into.numel() == 100 + GUARD
        assert set(into.tolist()) == {0xA5}
        rig.host.fill(0, 1, b"guard", 4096)
        assert holds(rig.fetch(rig.attach(), SlotRef(0, 1, 100)), b"guard")
