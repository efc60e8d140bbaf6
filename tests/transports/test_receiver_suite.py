"""The receivers' suite finds a client that takes slots in any order; a real `Receiver` passes it in test_nccl.py."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import pytest
import torch

from specd.transports.base import SlotRef, Transport
from specd.transports.inproc import Inproc, InprocClient
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.receiver_suite import ReceiverConformance
from specd.transports.testing.rig import Rig


class Careless(InprocClient):
    """Expects nothing of what it was told to expect."""

    def expect(self, ref: SlotRef, into: torch.Tensor) -> None: ...
    def cancel(self) -> None: ...


class Faulty(Inproc):
    @staticmethod
    def client(device: str) -> Careless:
        return Careless()


class Suite(ReceiverConformance):
    __test__ = False
    transport: ClassVar[type[Transport]] = Faulty

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, 4096)


@pytest.mark.parametrize("wrong", ["slot", "destination"])
def test_a_fetch_out_of_order_is_found(wrong: str) -> None:
    found = pytest.raises(pytest.fail.Exception, match="DID NOT RAISE")
    with contextlib.closing(Rig(Faulty, "cpu", Suite().host())) as rig, found:
        Suite().test_a_fetch_of_another_than_expected_is_refused(rig, wrong)


def test_a_client_that_is_no_receiver_is_found() -> None:
    with contextlib.closing(Rig(Inproc, "cpu", Suite().host())) as rig, pytest.raises(AssertionError):
        Suite().test_any_number_is_expected_and_fetched_in_order(rig)
