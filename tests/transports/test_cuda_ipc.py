"""What cuda_ipc and shm promise a trainer on a GPU beyond the suite, over a stand-in for CUDA."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import msgspec
import pytest
import torch

import fake_cuda
from specd.errors import TransportError
from specd.memory import cuda
from specd.memory.arena import HostArena
from specd.memory.device_arena import DeviceArena
from specd.transports.base import ServerContext, SlotRef
from specd.transports.checks import unwrap, wrap
from specd.transports.cuda_ipc import CudaIpc, CudaIpcClient, CudaIpcOffer
from specd.transports.shm import Shm, ShmClient
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.suite import TransportConformance, holds

GPU = "cuda:1"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two devices that are not there, and nothing of them in use afterwards."""
    fake_cuda.install(monkeypatch)
    yield
    assert not fake_cuda.registered, "page-locked memory is left"


class _ShmToGpu(Shm):
    """What a trainer on a GPU uses, while the suite's destinations are the CPU's: those of the stand-in."""

    @staticmethod
    def client(device: str) -> ShmClient:
        return ShmClient(GPU)


@pytest.mark.usefixtures("gpus")
class TestShmBetweenDevices(TransportConformance):
    transport = _ShmToGpu

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes, device="cuda:0")


@pytest.mark.usefixtures("gpus")
def test_shm_page_locks_what_a_trainer_on_a_gpu_maps() -> None:
    host = LocalHost(Shm, 2, 4096)
    client = Shm.client(GPU)
    offer = host.accept(b"one", client.hello())
    for _ in range(2):  # attaching anew gives the first mapping back
        client.attach(offer, 1.0)
        assert list(fake_cuda.registered.values()) == [4096 + 2 * 4096]
    client.close()
    assert not fake_cuda.registered
    on_cpu = Shm.client("cpu")
    on_cpu.attach(offer, 1.0)
    assert not fake_cuda.registered
    on_cpu.close()
    host.close()


@pytest.mark.usefixtures("gpus")
def test_shm_goes_on_with_pages_that_cannot_be_locked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(address: int, nbytes: int, device: str) -> None:
        raise TransportError("no more page-locked memory")

    monkeypatch.setattr(cuda, "register", refuse)
    host = LocalHost(Shm, 2, 4096)
    host.fill(0, 1, b"slow", 4096)
    client = Shm.client(GPU)
    client.attach(host.accept(b"one", client.hello()), 1.0)
    into = torch.zeros(4096, dtype=torch.uint8)
    client.fetch(SlotRef(0, 1, 4096), into, 1.0)
    assert holds(into, b"slow")
    assert [record.getMessage() for record in caplog.records] == [
        f"shm copies to {GPU} are several times slower: no more page-locked memory"
    ]
    client.close()
    host.close()


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

    def refilled(self: cuda.Mapping, offset: int, nbytes: int, into: int) -> None:
        host.fill(0, 2, b"new", 5000)
        read(self, offset, nbytes, into)

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

    def slow(self: cuda.Mapping, offset: int, nbytes: int, into: int) -> None:
        reading.set()
        assert closing.wait(10)
        read(self, offset, nbytes, into)

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
