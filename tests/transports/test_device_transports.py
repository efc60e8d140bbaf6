"""The transports over a device arena, on a machine without a GPU: what a stand-in for CUDA cannot show is left out.

Kernels, streams and the driver's own refusals are left to tests/system/test_gpu_transports.py.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fake_cuda
from specd.errors import TransportError
from specd.memory.device_arena import DeviceArena
from specd.transports.base import SlotRef, Transport
from specd.transports.bytes.server import Bytes
from specd.transports.inproc import Inproc
from specd.transports.registry import load
from specd.transports.shm import Shm
from specd.transports.testing.hosts import Host, LocalHost, SpawnedHost
from specd.transports.testing.suite import BorrowConformance, Rig, TransportConformance, holds

PLUGIN = Path(__file__).parents[1] / "plugin"
ENTRIES = {"fake_cuda_ipc": "fake_cuda_ipc:FakeCudaIpc", "fake_peer_ipc": "fake_cuda_ipc:FakePeerIpc"}
_children: list[SpawnedHost] = []
"""One process serves one test after the other: starting it takes longer than most."""


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Entry points of the plug-ins, on the path of this process and of its children."""
    site = tmp_path_factory.mktemp("site")
    info = site / "fake_cuda_ipc-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-cuda-ipc\nVersion: 0\n")
    lines = [f"{name} = {target}\n" for name, target in ENTRIES.items()]
    (info / "entry_points.txt").write_text("[specd.transports]\n" + "".join(lines))
    sys.path[:0] = [str(site), str(PLUGIN)]
    yield
    sys.path[:] = [path for path in sys.path if path not in (str(site), str(PLUGIN))]
    sys.modules.pop("fake_cuda_ipc", None)
    while _children:
        _children.pop().end()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)


def serve(name: str) -> Host:
    """A host of this transport with an empty arena on a stand-in device."""
    if _children:
        _children[0].reopen(name)
    else:
        slots, nbytes = TransportConformance.num_slots, TransportConformance.slot_bytes
        _children.append(SpawnedHost(name, slots, nbytes, device="cuda:0", lasting=True))
    return _children[0]


class TestCudaIpc(BorrowConformance):
    @pytest.fixture(autouse=True)
    def _transport(self) -> None:
        type(self).transport = load("fake_cuda_ipc")

    def host(self) -> Host:
        return serve("fake_cuda_ipc")


class TestShm(TransportConformance):
    transport = Shm

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes, device="cuda:0")


class TestBytes(TransportConformance):
    transport = Bytes

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes, device="cuda:0")


class TestInproc(TransportConformance):
    transport = Inproc

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes, device="cuda:0")


def test_a_peer_copies_but_does_not_borrow() -> None:
    rig = Rig(load("fake_peer_ipc"), "cpu", serve("fake_peer_ipc"))
    try:
        client = rig.attach()
        rig.host.fill(1, 3, b"peer", 100_000)
        assert holds(rig.fetch(client, SlotRef(1, 3, 100_000)), b"peer")
        with pytest.raises(TransportError, match="GPU that holds them"):
            client.view(SlotRef(1, 3, 100_000))  # type: ignore[attr-defined]
    finally:
        rig.close()


def test_a_trainer_reads_on_after_the_worker_is_gone_but_takes_nothing_new() -> None:
    transport = load("fake_cuda_ipc")
    host = SpawnedHost("fake_cuda_ipc", 2, 4096, device="cuda:0")
    rig = Rig(transport, "cpu", host)
    try:
        client = rig.attach()
        offer = host.accept(b"two", client.hello())
        host.fill(0, 1, b"left", 4096)
        host.kill()
        assert holds(rig.fetch(client, SlotRef(0, 1, 4096)), b"left")
        with pytest.raises(TransportError):
            rig.fetch(client, SlotRef(0, 2, 4096))
        with pytest.raises(TransportError, match="cannot open"):
            transport.client("cuda:0").attach(offer, 1.0)
    finally:
        rig.close()


@pytest.mark.parametrize("transport", [Shm, Bytes, Inproc])
def test_a_device_arena_gives_all_its_memory_back(transport: type[Transport]) -> None:
    files = len(os.listdir("/proc/self/fd"))
    host = LocalHost(transport, 2, 100_000, device="cuda:0")
    assert fake_cuda.registered
    host.close()
    assert not fake_cuda.registered
    assert not fake_cuda.live
    assert len(os.listdir("/proc/self/fd")) <= files + 1  # zmq keeps one of a context that ends


def test_a_host_serves_anew_in_the_same_process() -> None:
    host = SpawnedHost("fake_cuda_ipc", 1, 4096, device="cuda:0", lasting=True)
    try:
        epoch, pid = host.epoch, host.pid
        host.fill(0, 7, b"", 10)
        host.close()
        with pytest.raises(TransportError):
            host.fill(0, 8, b"", 10)
        host.reopen("fake_cuda_ipc")
        assert (host.epoch != epoch, host.pid == pid) == (True, True)
        rig = Rig(load("fake_cuda_ipc"), "cpu", host)
        with pytest.raises(TransportError, match="holds generation 0"):
            rig.fetch(rig.attach(), SlotRef(0, 7, 10))
        rig.close()
    finally:
        host.end()
    with pytest.raises(TransportError):
        host.reopen("fake_cuda_ipc")


def test_a_load_needs_a_device() -> None:
    host = LocalHost(Shm, 1, 4096)
    try:
        with pytest.raises(TransportError, match="host memory"):
            host.start_load()
        with pytest.raises(TransportError, match="start it first"):
            host.stop_load()
    finally:
        host.close()


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
