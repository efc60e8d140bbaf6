"""The hosts that tests and benchmarks fetch from, in this process: what they keep, and give back."""

from __future__ import annotations

import contextlib
import os

import pytest

import fake_cuda
from specd.errors import TransportError
from specd.memory.device_arena import DeviceArena
from specd.transports.base import Transport
from specd.transports.bytes.server import Bytes
from specd.transports.inproc import Inproc
from specd.transports.shm import Shm
from specd.transports.testing.hosts import LocalHost


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("transport", [Shm, Bytes, Inproc])
def test_a_device_arena_gives_all_its_memory_back(transport: type[Transport]) -> None:
    files = len(os.listdir("/proc/self/fd"))
    host = LocalHost(transport, 2, 100_000, device="cuda:0")
    assert fake_cuda.registered
    host.close()
    assert not fake_cuda.registered
    assert not fake_cuda.live
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # zmq keeps one of a context that ends


@pytest.mark.usefixtures("gpus")
def test_a_mirror_is_only_kept_for_sessions_that_read_it() -> None:
    host = LocalHost(Bytes, 1, 4096, device="cuda:0")
    arena = host._arena
    assert isinstance(arena, DeviceArena)
    try:
        host.fill(0, 1, b"", 4096)
        assert (arena.generation(0), arena.ledger.generation(0)) == (1, 0)
        host.accept(b"one", Bytes.client("cpu").hello())
        assert arena.ledger.generation(0) == 1
        host.drop(b"one")
        host.fill(0, 2, b"", 4096)
        assert (arena.generation(0), arena.ledger.generation(0)) == (2, 0)
    finally:
        host.close()


def test_a_question_that_only_a_subclass_knows() -> None:
    host = LocalHost(Inproc, 1, 4096)
    with contextlib.closing(host), pytest.raises(TransportError, match="does not know 'cpu_s'"):
        host.ask("cpu_s")
