"""shm: the suite over both kinds of arena and from another process, who may map what, page-locked mappings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import fake_cuda
from specd.errors import TransportError
from specd.memory import cuda
from specd.memory.arena import HostArena
from specd.transports.base import ServerContext, SlotRef
from specd.transports.checks import wrap
from specd.transports.shm import Shm, ShmClient, ShmOffer
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.suite import TransportConformance, holds

GPU = "cuda:1"


class TestShm(TransportConformance):
    transport = Shm


@pytest.mark.usefixtures("gpus")
class TestFromADevice(TransportConformance):
    transport = Shm

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes, device="cuda:0")


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


def test_a_trainer_cannot_write_the_shared_ring() -> None:
    with HostArena.create(1, 4096, "ab" * 16) as arena, HostArena.open(arena.path, 1, 4096) as view:
        with pytest.raises(TypeError):
            view.slot(0)[0] = 1
        with pytest.raises(TypeError):
            view.seal(0, 5)


def test_shm_keeps_serving_what_is_mapped_after_the_worker_is_gone(tmp_path: Path) -> None:
    host = LocalHost(Shm, 2, 4096)
    client = Shm.client("cpu")
    client.attach(host.accept(b"one", client.hello()), 1.0)
    host.fill(0, 1, b"left", 4096)
    host.close()
    into = torch.zeros(4096, dtype=torch.uint8)
    client.fetch(SlotRef(0, 1, 4096), into, 1.0)
    assert holds(into, b"left")
    client.close()


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "/dev/shm/../etc/passwd", "/dev/shm/specd-{uid}-", "/dev/shm/specd-{uid}-../x",
     "/dev/shm/specd-{uid}-zz", "/dev/shm/specd-{other}-" + "0" * 32, "specd-{uid}-" + "0" * 32,
     "/dev/shm/specd-{uid}-" + "0" * 32],
)  # fmt: skip
def test_shm_offers_of_other_files_are_refused(path: str) -> None:
    path = path.format(uid=os.getuid(), other=os.getuid() + 1)
    offer = wrap(ShmOffer(path=path, num_slots=1, slot_bytes=4096))
    client = Shm.client("cpu")
    with pytest.raises(TransportError):
        client.attach(offer, 1.0)


def test_shm_refuses_a_private_ring_and_a_trainer_elsewhere() -> None:
    with HostArena.create(1, 4096, None) as arena, pytest.raises(TransportError, match="shared host memory"):
        Shm.server(arena, ServerContext())
    with HostArena.create(1, 4096, "cd" * 16) as arena, pytest.raises(TransportError, match="daemon's host"):
        Shm.server(arena, ServerContext()).accept(b"one", wrap({"host": "elsewhere"}))


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


def test_shm_serves_no_ledger_without_slots() -> None:
    with HostArena.create(1, 0, "ab" * 16) as ledger, pytest.raises(TransportError, match="host memory"):
        Shm.server(ledger, ServerContext())
