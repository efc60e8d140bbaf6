"""Which transports serve a ring, where its memory is made, what is left out or refused; over a stand-in for CUDA."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

import fake_cuda
from specd.config.settings import DaemonConfig, RingConfig, TargetConfig
from specd.errors import TransportError
from specd.memory.arena import HostArena
from specd.memory.segment import NoRoomError, segment_path
from specd.transports.base import ServerContext
from specd.worker import ring_memory as serving
from workers import Known, Served, only_these

EPOCH = secrets.token_bytes(16)
SLOT_BYTES = 4096


@pytest.fixture(autouse=True)
def device_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever fails, nothing is left behind."""
    fake_cuda.install(monkeypatch)
    yield
    assert not fake_cuda.registered
    assert not Path(segment_path(EPOCH.hex())).exists()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    return only_these(monkeypatch)


def served(
    device: str, *transports: str, where: ServerContext | None = None, insecure_data: bool = False
) -> tuple[str, ...]:
    """What serves a ring on `device` that was asked for with `transports`."""
    target, ring_config = TargetConfig(model="any"), RingConfig(slots=3)
    config = DaemonConfig(target=target, transports=transports, ring=ring_config, insecure_data=insecure_data)
    ring = serving.open_ring(config, SLOT_BYTES, device, EPOCH, where or ServerContext())
    with ring.arena:
        assert ring.arena.path in ("", segment_path(EPOCH.hex()))
    return tuple(ring.servers)


@pytest.mark.parametrize(
    ("device", "names"), [("cpu", ("shm", "bytes")), ("cuda:0", ("cuda_ipc", "nccl", "shm", "bytes"))]
)
def test_auto_serves_all_that_the_ring_allows(known: Known, device: str, names: tuple[str, ...]) -> None:
    assert served(device, "auto") == names
    kinds = {name: known[name].arena.memory for name in names}
    assert kinds == {name: "device" if name in ("cuda_ipc", "nccl") else "host" for name in names}
    assert known["shm"].arena.slot_bytes == SLOT_BYTES


def test_auto_leaves_out_what_does_not_work(known: Known, caplog: pytest.LogCaptureFixture) -> None:
    known["cuda_ipc"].problem = "no driver"
    del known["nccl"]
    with caplog.at_level("INFO", logger="specd.worker.ring_memory"):
        assert served("cuda:0", "auto") == ("shm", "bytes")
    said = [record.getMessage() for record in caplog.records]
    assert "cuda_ipc is not served: no driver" in said
    assert "nccl is not served: nccl cannot be imported" in said


def test_auto_leaves_out_what_is_not_available_here(known: Known, caplog: pytest.LogCaptureFixture) -> None:
    known["nixl"] = Served(["host", "device"], "anywhere", rank=300)
    known["nixl"].missing = "no RDMA device"
    with caplog.at_level("INFO", logger="specd.worker.ring_memory"):
        assert served("cuda:0", "auto") == ("cuda_ipc", "nccl", "shm", "bytes")
    assert "nixl is not served: no RDMA device" in caplog.messages
    assert served("cuda:0", "nixl") == ("nixl",), "one that is named is not asked"
    known["nixl"].missing = ""
    assert served("cuda:0", "auto") == ("cuda_ipc", "nixl", "nccl", "shm", "bytes")
    assert known["nixl"].arena.memory == "device", "what takes both is given the device's"
    assert served("cpu", "auto") == ("shm", "bytes"), "and left to those who name it for a ring in host memory"


def test_auto_leaves_out_a_plugin_that_fails_in_its_own_way(
    known: Known, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_device: str) -> None:
        raise RuntimeError("no such library")

    known["rdma"], known["fabric"] = Served(["host"], rank=100), Served(["host"], rank=110)
    monkeypatch.setattr(known["rdma"], "available", fail)
    known["fabric"].fault = OSError("no such device")
    with caplog.at_level("INFO", logger="specd.worker.ring_memory"):
        assert served("cpu", "auto") == ("shm", "bytes")
    assert "rdma is not served: RuntimeError: no such library" in caplog.messages
    assert "fabric is not served: OSError: no such device" in caplog.messages
    with pytest.raises(TransportError, match="'fabric' cannot be served: OSError: no such device"):
        served("cpu", "fabric")


def test_with_keys_nothing_leaves_the_host_in_the_clear_unless_that_was_asked_for(
    known: Known, caplog: pytest.LogCaptureFixture
) -> None:
    known["sealed"] = Served(["device"], "anywhere", rank=350, sealed=True)
    far = ServerContext(host="192.0.2.7", curve=True)
    everything = ("cuda_ipc", "sealed", "nccl", "shm", "bytes")
    known["bytes"].traits = msgspec.structs.replace(known["bytes"].traits, sealed=True)
    with caplog.at_level("INFO", logger="specd.worker.ring_memory"):
        assert served("cuda:0", "auto", where=far) == ("cuda_ipc", "sealed", "shm", "bytes")
    assert any("nccl is not served: it does not encrypt states" in message for message in caplog.messages)
    with pytest.raises(TransportError, match=r"'nccl' cannot be served: it does not encrypt .* --insecure-data"):
        served("cuda:0", "nccl", where=far)
    assert served("cuda:0", "auto", where=far, insecure_data=True) == everything
    assert served("cuda:0", "auto", where=ServerContext(host="192.0.2.7")) == everything, "without keys"
    assert served("cuda:0", "auto", where=ServerContext(host="::1", curve=True)) == everything, "within one host"


def test_auto_serves_a_plugin_where_its_rank_says(known: Known) -> None:
    known["rdma"] = Served(["host", "device"], "anywhere", rank=250)
    known["carrier"] = Served(["host"])
    assert served("cuda:0", "auto") == ("cuda_ipc", "rdma", "nccl", "shm", "bytes")
    assert served("cpu", "auto", "carrier") == ("shm", "bytes", "carrier")


@pytest.mark.parametrize(
    ("device", "asked", "reason"),
    [
        ("cuda:0", ("bytes", "cuda_ipc"), "transport 'cuda_ipc' cannot be served: no driver"),
        ("cuda:0", ("auto", "cuda_ipc"), "transport 'cuda_ipc' cannot be served: no driver"),
        ("cpu", ("nccl",), "'nccl' cannot be served: it moves device memory"),
        ("cpu", ("shm", "gone"), "'gone' cannot be served: gone cannot be imported"),
    ],
)
def test_a_transport_that_was_named_must_work(known: Known, device: str, asked: tuple[str, ...], reason: str) -> None:
    known["cuda_ipc"].problem = "no driver"
    with pytest.raises(TransportError, match=reason):
        served(device, *asked)
    assert not any(one.arena is not None and not one.closed_before_its_arena for one in known.values())


@pytest.mark.parametrize(("device", "left"), [("cpu", ("bytes",)), ("cuda:0", ("cuda_ipc", "nccl"))])
def test_auto_leaves_out_what_shared_memory_is_too_small_for(
    known: Known, monkeypatch: pytest.MonkeyPatch, device: str, left: tuple[str, ...]
) -> None:
    """The generations of a ring on a device still fit."""
    create = HostArena.create

    def full(num_slots: int, slot_bytes: int, shared: str | None) -> HostArena:
        if shared and slot_bytes:
            raise NoRoomError("the ring needs more shared memory than there is")
        return create(num_slots, slot_bytes, shared)

    monkeypatch.setattr(HostArena, "create", full)
    assert served(device, "auto") == left
    with pytest.raises(TransportError, match="transport 'shm' cannot be served: the ring needs more"):
        served(device, "auto", "shm")


def test_a_ring_nobody_can_read_is_not_served(known: Known) -> None:
    known.clear()
    with pytest.raises(TransportError, match="no transport can serve a ring on cuda:0"):
        served("cuda:0", "auto")


def test_device_memory_that_cannot_be_had_fails_the_start(
    known: Known, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_args: object) -> None:
        raise TransportError("cannot reserve 7 MiB on cuda:0: out of memory; configure fewer or shorter slots")

    monkeypatch.setattr(fake_cuda.Allocation, "__init__", refuse)
    caplog.set_level("INFO", logger="specd.worker.ring_memory")
    with pytest.raises(TransportError, match="7 MiB on cuda:0"):
        served("cuda:0", "auto")
    assert caplog.records == [], "no transport is to blame"
