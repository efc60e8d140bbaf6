"""cuda_ipc over a stand-in for CUDA: the suite, a peer, a worker that is gone, offers and what is missing here."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

import fake_cuda
from specd.errors import TransportError
from specd.memory import cuda
from specd.memory.arena import HostArena
from specd.memory.device_arena import DeviceArena
from specd.protocol.cut import Piece
from specd.transports.base import ServerContext, SlotRef
from specd.transports.checks import unwrap, wrap
from specd.transports.cuda_ipc import CudaIpc, CudaIpcClient, CudaIpcOffer
from specd.transports.registry import load
from specd.transports.testing.borrow_suite import BorrowConformance
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.spawned import SpawnedHost
from specd.transports.testing.suite import Rig, TransportConformance, holds

GPU = "cuda:1"
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


def serve(name: str) -> Host:
    """A host of this transport with an empty arena on a stand-in device."""
    if _children:
        _children[0].reopen(name)
    else:
        slots, nbytes = TransportConformance.num_slots, TransportConformance.slot_bytes
        _children.append(SpawnedHost(name, slots, nbytes, device="cuda:0", lasting=True))
    return _children[0]


def _cuda_ipc(device: str = GPU) -> tuple[LocalHost, CudaIpcClient, CudaIpcOffer]:
    """A host on `cuda:1`, a trainer on `device`, and what the one offers the other."""
    host = LocalHost(CudaIpc, 2, 5000, device=GPU)
    client = CudaIpc.client(device)
    return host, client, unwrap(host.accept(b"one", client.hello()), CudaIpcOffer, "offer")


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"handle": b"short"}, "handle of 5 bytes"),
        ({"num_slots": 0}, "out of range"),
        ({"num_slots": 3}, "expected"),
        ({"slot_bytes": 0}, "out of range"),
        ({"slot_bytes": 8193}, "out of range"),
        ({"stride": 1 << 60}, "out of range"),
        ({"path": "/etc/passwd"}, "not a segment"),
        ({"ledger_bytes": 4096}, "expected"),
    ],
)
def test_cuda_ipc_offers_that_make_no_sense_are_refused(change: dict[str, object], match: str) -> None:
    host, client, offer = _cuda_ipc()
    with pytest.raises(TransportError, match=match):
        client.attach(wrap(msgspec.structs.replace(offer, **change)), 1.0)
    with pytest.raises(TransportError, match="not attached"):
        client.fetch(SlotRef(0, 1, 1), torch.zeros(1, dtype=torch.uint8), 1.0)
    host.close()


@pytest.mark.usefixtures("gpus")
def test_cuda_ipc_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransportError, match="delivers to a GPU, and the trainer's device is cpu"):
        CudaIpc.client("cpu")
    with HostArena.create(1, 4096, "ab" * 16) as host_arena, pytest.raises(TransportError, match="shared device"):
        CudaIpc.server(host_arena, ServerContext())
    with DeviceArena.create(1, 4096, GPU, None, False) as arena, pytest.raises(TransportError, match="shared device"):
        CudaIpc.server(arena, ServerContext())
    host, client, offer = _cuda_ipc("cuda:0")
    with pytest.raises(TransportError, match="the daemon's host: use --transport nccl or bytes"):
        host.accept(b"far", wrap({"host": "elsewhere", "gpu": "GPU-1"}))
    dead = msgspec.structs.replace(offer, handle=b"/proc/0/fd/0".ljust(64, b"\0"))
    with pytest.raises(TransportError, match="cuda:0 cannot open the daemon's ring on GPU-fake-1: ") as seen:
        client.attach(wrap(dead), 1.0)
    assert "does not see" not in str(seen.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(cuda, "visible", lambda: {"GPU-fake-0": "cuda:0"})
    with pytest.raises(TransportError, match=r"does not see that GPU.*CUDA_VISIBLE_DEVICES: 0\)"):
        client.attach(wrap(dead), 1.0)
    monkeypatch.setattr(cuda, "visible", fake_cuda.visible)
    monkeypatch.setattr(cuda, "can_read", lambda device, other: False)
    with pytest.raises(TransportError, match="cuda:0 has no peer access to cuda:1"):
        client.attach(wrap(offer), 1.0)
    host.close()


def test_cuda_ipc_needs_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch, cupy=False)
    with pytest.raises(TransportError, match="cupy"):
        CudaIpc.client(GPU)
    with DeviceArena.create(1, 4096, GPU, "ab" * 16, False) as arena, pytest.raises(TransportError, match="cupy"):
        CudaIpc.server(arena, ServerContext())


@pytest.mark.usefixtures("gpus")
def test_cuda_ipc_is_refilled_under_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    host, client, offer = _cuda_ipc()
    client.attach(wrap(offer), 1.0)
    host.fill(0, 1, b"old", 5000)
    read = cuda.Mapping.read

    def refilled(self: cuda.Mapping, offset: int, nbytes: int, into: int, pieces: tuple[Piece, ...] = ()) -> None:
        host.fill(0, 2, b"new", 5000)
        read(self, offset, nbytes, into, pieces)

    monkeypatch.setattr(cuda.Mapping, "read", refilled)
    with pytest.raises(TransportError, match="holds generation 2, the lease is for 1"):
        client.fetch(SlotRef(0, 1, 5000), torch.zeros(5000, dtype=torch.uint8), 1.0)
    client.close()
    host.close()


@pytest.mark.usefixtures("gpus")
def test_cuda_ipc_closes_only_between_two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is unmapped under a copy would take the trainer's whole device context with it."""
    host, client, offer = _cuda_ipc()
    client.attach(wrap(offer), 1.0)
    host.fill(0, 1, b"whole", 5000)
    read, reading, closing = cuda.Mapping.read, threading.Event(), threading.Event()

    def slow(self: cuda.Mapping, offset: int, nbytes: int, into: int, pieces: tuple[Piece, ...] = ()) -> None:
        reading.set()
        assert closing.wait(10)
        read(self, offset, nbytes, into, pieces)

    def close() -> None:
        assert reading.wait(10)
        closing.set()
        client.close()

    monkeypatch.setattr(cuda.Mapping, "read", slow)
    closer = threading.Thread(target=close)
    closer.start()
    into = torch.zeros(5000, dtype=torch.uint8)
    client.fetch(SlotRef(0, 1, 5000), into, 1.0)
    closer.join()
    assert holds(into, b"whole")
    host.close()


@pytest.mark.usefixtures("gpus")
class TestCudaIpc(BorrowConformance):
    @pytest.fixture(autouse=True)
    def _transport(self) -> None:
        type(self).transport = load("fake_cuda_ipc")

    def host(self) -> Host:
        return serve("fake_cuda_ipc")


@pytest.mark.usefixtures("gpus")
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


@pytest.mark.usefixtures("gpus")
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


@pytest.mark.usefixtures("gpus")
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
