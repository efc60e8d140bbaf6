"""Slots read in place on the target's own GPU: nothing is copied, and none is refilled while it may be read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch

from faults import Daemon, daemons, settled
from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.errors import TransportError
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec
from specd.protocol.messages import StatusReport

pytestmark = pytest.mark.gpu(1)

DEVICE = "cuda:0"
LEASE_S = 2.0
SPEC = CaptureSpec(taps=(1, 4), dtype="float32")
BORROWER = """
import sys, torch
from samples import batch
from specd.protocol.capture import CaptureSpec
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
config = SubscriberConfig(endpoints=(sys.argv[1],), transport="cuda_ipc", depth=0, borrow=True)
with Subscriber(config, CaptureSpec(taps=(1, 4), dtype="float32"), device="cuda:0") as source:
    for delivery in source.stream([batch(1000)]):
        seen = delivery.taps.clone()
        torch.cuda.synchronize()
        print("holds", flush=True)
        sys.stdin.readline()
        print(torch.equal(seen, delivery.taps), flush=True)
"""
"""A trainer that keeps a borrowed batch until it is told to go on, then says whether the batch stayed as it was."""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with daemons(DEVICE, lease_s=LEASE_S) as start:
        yield start("a")


def subscribe(daemon: Daemon, transport: str, device: str = DEVICE, *, borrow: bool = False) -> Subscriber:
    config = SubscriberConfig(
        endpoints=(daemon.endpoint,), transport=transport, depth=1, borrow=borrow, timeout_s=60, connect_s=60
    )
    return Subscriber(config, SPEC, device=device)


def states(daemon: Daemon, batches: list[Batch]) -> list[torch.Tensor]:
    """The taps of batches over a host transport, on the CPU: they are filled into every free slot."""
    with subscribe(daemon, "shm", "cpu") as source:
        return [taps(delivery.taps) for delivery in source.stream(batches)]


def taps(found: torch.Tensor | None) -> torch.Tensor:
    assert found is not None
    return found.to("cpu", copy=True)


def wait_for(daemon: Daemon, reached: Callable[[StatusReport], bool]) -> None:
    limit = time.monotonic() + LEASE_S + 15
    while not reached(status := daemon.status()):
        assert time.monotonic() < limit, status
        time.sleep(0.05)


def test_a_borrowed_batch_is_read_where_it_lies(daemon: Daemon) -> None:
    batches = [batch(index) for index in range(12)]
    expected = states(daemon, batches)
    with subscribe(daemon, "cuda_ipc", borrow=True) as source:
        for number, delivery in enumerate(source.stream(batches)):
            assert delivery.taps is not None
            assert not of_torch(delivery.taps), "torch allocated it: it is a copy"
            if number == 3:  # every other slot is refilled several times
                states(daemon, [batch(100 + index) for index in range(40)])
            assert torch.equal(taps(delivery.taps), expected[number])
    settled(daemon)


def of_torch(tensor: torch.Tensor) -> bool:
    """Whether a tensor lies in memory that torch allocated in this process."""
    segments = cast(Any, torch.cuda).memory_snapshot()  # untyped
    return any(found["address"] <= tensor.data_ptr() < found["address"] + found["total_size"] for found in segments)


def test_a_slot_whose_reader_was_stopped_is_not_refilled_before_that_is_dead(daemon: Daemon) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", BORROWER, daemon.endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as reader:
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "holds\n"
            reader.send_signal(signal.SIGSTOP)
            wait_for(daemon, lambda status: not status.sessions and status.slots["quarantined"] == 1)
            others = [batch(200 + index) for index in range(40)]
            assert len(states(daemon, others)) == 40, "others are served from the slots that are left"
            assert daemon.status().slots["quarantined"] == 1
            reader.send_signal(signal.SIGCONT)
            answer, _ = reader.communicate("go on\n", timeout=60)
            assert (answer, reader.returncode) == ("True\n", 0)
        finally:
            reader.kill()
    wait_for(daemon, lambda status: status.slots["quarantined"] == 0)
    settled(daemon)


@pytest.mark.gpu(2)
def test_a_batch_cannot_be_borrowed_from_another_gpu(daemon: Daemon) -> None:
    with pytest.raises(TransportError, match="GPU that holds them"):
        subscribe(daemon, "cuda_ipc", "cuda:1", borrow=True)
    with pytest.raises(TransportError, match="cannot lend slots in place"):
        subscribe(daemon, "shm", borrow=True)
    settled(daemon)
