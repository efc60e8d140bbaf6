"""inproc: the suite over both kinds of arena, and offers of other processes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from specd.errors import TransportError
from specd.transports.base import SlotRef
from specd.transports.inproc import Inproc
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.suite import TransportConformance


class TestInproc(TransportConformance):
    transport = Inproc


@pytest.mark.usefixtures("gpus")
class TestOnADevice(TransportConformance):
    transport = Inproc

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes, device="cuda:0")


def test_an_offer_of_another_process_is_refused() -> None:
    with contextlib.closing(LocalHost(Inproc, 1, 4096)) as host:
        client = Inproc.client("cpu")
        offer = host.accept(b"one", client.hello())
        for other in (bytes(16), offer[:-1], b""):
            with pytest.raises(TransportError, match="no arena of this process"):
                client.attach(other, 1.0)
        with pytest.raises(TransportError, match="expected none"):
            host.accept(b"one", b"hello")
        client.attach(offer, 1.0)
        host.accept(b"one", b"")  # a session that is accepted again starts afresh
        with pytest.raises(TransportError, match="the daemon ended the session"):
            client.fetch(SlotRef(0, 1, 1), torch.zeros(1, dtype=torch.uint8), 1.0)
