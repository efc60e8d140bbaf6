"""The benchmark's host: CPU seconds of a child process, and a load that needs a device."""

from __future__ import annotations

import contextlib
import time

import pytest

from specd.bench.transport.loaded import LoadedHost
from specd.errors import TransportError
from specd.transports.base import SlotRef
from specd.transports.cuda_ipc import CudaIpc
from specd.transports.testing.rig import Rig, holds


def test_a_host_in_another_process_says_what_it_costs() -> None:
    with contextlib.closing(LoadedHost("shm", 1, 4096)) as host:
        before = host.cpu_s()
        host.fill(0, 1, b"work", 4096)
        assert host.cpu_s() > before > 0
        with pytest.raises(TransportError, match="host memory"):
            host.start_load()
        with pytest.raises(TransportError, match="start it first"):
            host.stop_load()
        with pytest.raises(TransportError, match="does not know 'more'"):
            host.ask("more")


@pytest.mark.gpu(1)
def test_a_load_runs_beside_transfers() -> None:
    nbytes = 1 << 20
    host = LoadedHost("cuda_ipc", 1, nbytes, device="cuda:0")
    with contextlib.closing(Rig(CudaIpc, "cuda:0", host)) as rig:
        client = rig.attach()
        host.fill(0, 1, b"busy", nbytes)
        for _ in range(2):
            host.start_load()
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                assert holds(rig.fetch(client, SlotRef(0, 1, nbytes)), b"busy")
            assert 1.0 < host.stop_load() < 5000.0
