"""The nixl transport: against the suite with NIXL where it is installed, and everywhere with a stand-in for it."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pickle
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import pytest
import torch

from specd.errors import TransportError
from specd.memory.arena import HostArena
from specd.protocol.cut import Piece, gather
from specd.transports.base import ServerContext, SlotRef
from specd.transports.checks import pattern, wrap
from specd.transports.nixl import cutting
from specd.transports.nixl.agent import Region
from specd.transports.nixl.transport import Nixl, NixlServer, checked
from specd.transports.testing.hosts import LocalHost
from specd.transports.testing.spawned import SpawnedHost
from specd.transports.testing.suite import Rig, TransportConformance, holds

installed = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl_cu13", "nixl_cu12")),
    reason="needs NIXL: pip install --no-deps nixl-cu13",
)


@installed
class TestNixl(TransportConformance):
    transport = Nixl


def from_elsewhere(host: SpawnedHost, device: str) -> None:
    """The calls of the suite that matter across a process border."""
    suite = TransportConformance()
    suite.transport = Nixl  # type: ignore[misc]
    rig = Rig(Nixl, device, host)
    try:
        suite.test_bytes_are_exact_at_every_size(rig)
        suite.test_every_slot_and_large_generations(rig)
        suite.test_a_refill_under_way_is_noticed(rig)
        suite.test_pieces_of_a_slot_are_cut_out_and_packed(rig)
        suite.test_two_sessions_do_not_disturb_each_other(rig)
        suite.test_a_dropped_session_gets_nothing(rig)
        suite.test_a_session_can_be_accepted_again(rig)
    finally:
        rig.close()


def suite_host(device: str = "cpu") -> SpawnedHost:
    return SpawnedHost("nixl", TransportConformance.num_slots, TransportConformance.slot_bytes, device=device)


@installed
def test_from_another_process() -> None:
    from_elsewhere(suite_host(), "cpu")


@installed
@pytest.mark.gpu(1)
@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_from_another_process_on_the_same_gpu(device: str) -> None:
    from_elsewhere(suite_host("cuda:0"), device)


@installed
@pytest.mark.gpu(2)
def test_from_another_process_on_another_gpu() -> None:
    from_elsewhere(suite_host("cuda:0"), "cuda:1")


@installed
def test_a_worker_that_dies_loses_the_client_and_its_engine() -> None:
    host = SpawnedHost("nixl", 1, 1 << 20)
    client = Nixl.client("cpu")
    try:
        client.attach(host.accept(b"one", client.hello()), 10.0)
        host.fill(0, 1, b"late", 1 << 20)
        into = torch.zeros(1 << 20, dtype=torch.uint8)
        client.fetch(SlotRef(0, 1, 1 << 20), into, 10.0)
        assert holds(into, b"late")
        engine = weakref.ref(client._agent._nixl.agent)
        host.kill()
        begin = time.monotonic()
        with pytest.raises(TransportError) as lost:
            client.fetch(SlotRef(0, 1, 1 << 20), into, 10.0)
        assert lost.value.lost
        assert time.monotonic() - begin < 5.0
        assert engine() is None, "the transfer could still land in the buffer"
        for _ in range(2):
            with pytest.raises(TransportError) as again:
                client.fetch(SlotRef(0, 1, 1 << 20), into, 10.0)
            assert again.value.lost
    finally:
        client.close()
        host.close()


@installed
def test_a_worker_that_is_stopped_can_be_read_from() -> None:
    host = SpawnedHost("nixl", 1, 1 << 20)
    client = Nixl.client("cpu")
    try:
        host.fill(0, 1, b"one-sided", 1 << 20)
        client.attach(host.accept(b"one", client.hello()), 10.0)
        os.kill(host.pid, signal.SIGSTOP)
        into = torch.zeros(1 << 20, dtype=torch.uint8)
        client.fetch(SlotRef(0, 1, 1 << 20), into, 10.0)
        assert holds(into, b"one-sided")
    finally:
        os.kill(host.pid, signal.SIGCONT)
        client.close()
        host.close()


@installed
def test_an_offer_of_more_than_the_metadata_covers_is_refused() -> None:
    host = LocalHost(Nixl, 1, 4096)
    with contextlib.closing(host):
        for change in (
            {"words": Region(memory="DRAM", address=8, nbytes=8)},
            {"agent": "specd-other"},
            {"metadata": b"nixlSerDes|"},
            {"metadata": b"no metadata"},
        ):
            with contextlib.closing(Nixl.client("cpu")) as client:
                offer = checked(host.accept(b"one", client.hello()))
                with pytest.raises(TransportError):
                    client.attach(wrap(msgspec.structs.replace(offer, **change)), 2.0)
        with contextlib.closing(Nixl.client("cpu")) as client:
            offer = checked(host.accept(b"one", client.hello()))
            client.attach(wrap(msgspec.structs.replace(offer, slots=Region(memory="DRAM", address=8, nbytes=4096))), 2)
            host.fill(0, 1, b"", 4096)
            with pytest.raises(TransportError) as refusal:
                client.fetch(SlotRef(0, 1, 4096), torch.zeros(4096, dtype=torch.uint8), 2.0)
            assert refusal.value.lost


@installed
def test_trainers_that_vanish_while_they_connect_do_not_harm_the_worker() -> None:
    with contextlib.closing(SpawnedHost("nixl", 1, 4096)) as host:
        host.fill(0, 1, b"still here", 4096)
        for number in range(30):
            with contextlib.closing(Nixl.client("cpu")) as client:
                offer = checked(host.accept(b"%d" % number, client.hello()))
                client._agent.connect(offer.agent, offer.metadata)
        with contextlib.closing(Nixl.client("cpu")) as client:
            client.attach(host.accept(b"one", client.hello()), 10.0)
            into = torch.zeros(4096, dtype=torch.uint8)
            client.fetch(SlotRef(0, 1, 4096), into, 10.0)
            assert holds(into, b"still here")


@installed
def test_nothing_is_unpickled_and_no_port_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    before = listening()
    with contextlib.closing(LocalHost(Nixl, 1, 4096)) as host, contextlib.closing(Nixl.client("cpu")) as client:
        for name in ("loads", "load", "Unpickler"):
            monkeypatch.setattr(pickle, name, refuse)
        client.attach(host.accept(b"one", client.hello()), 10.0)
        host.fill(0, 1, b"clean", 4096)
        into = torch.zeros(4096, dtype=torch.uint8)
        client.fetch(SlotRef(0, 1, 4096), into, 10.0)
        assert holds(into, b"clean")
        assert listening() == before
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))):
        assert len(listening()) == len(before) + 1


def listening() -> set[str]:
    """TCP ports that this process listens on, each with its address."""
    mine = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            mine.add(os.readlink(f"/proc/self/fd/{name}"))
    rows = [
        row.split() for file in ("tcp", "tcp6") for row in Path("/proc/self/net", file).read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine}


class Loopback:
    """An agent whose peer is this process: the transport without NIXL. before_read: called with each READ's source."""

    before_read: ClassVar[Callable[[Region], None]] = staticmethod(lambda source: None)

    def __init__(self, device: str) -> None:
        self.name = f"loopback-{device}"
        self.closed = False
        self.known: list[Region] = []

    def current(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def register(self, region: Region) -> Region:
        self.known.append(region)
        return region

    def deregister(self, region: Region) -> None:
        self.known.remove(region)

    def metadata(self) -> bytes:
        return b"loopback"

    def connect(self, name: str, metadata: bytes) -> None:
        assert (name, metadata) == (self.name, b"loopback")

    def progress(self) -> None:
        assert not self.closed, "used after it was closed"

    def read(self, into: Region, source: Region, deadline: float, stop: threading.Event) -> None:
        assert not self.closed, "used after it was closed"
        assert any(region.covers(into) for region in self.known), "the destination is not registered"
        assert into.nbytes == source.nbytes
        type(self).before_read(source)
        if time.monotonic() >= deadline:
            raise TransportError("too late")
        ctypes.memmove(into.address, source.address, source.nbytes)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specd.transports.nixl.transport.NixlAgent", Loopback)


@pytest.mark.usefixtures("loopback")
class TestAroundNixl(TransportConformance):
    """All that is ours: offers, addresses, generation words, destinations, threads."""

    transport = Nixl


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_refill_is_noticed_whenever_it_starts(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    with contextlib.closing(LocalHost(Nixl, 2, 8192)) as host, contextlib.closing(Nixl.client("cpu")) as client:
        client.attach(host.accept(b"one", client.hello()), 10.0)
        host.fill(1, 5, b"old", 8192)
        reads: list[int] = []

        def refill(source: Region) -> None:
            reads.append(source.nbytes)
            if len(reads) == moment:
                host.begin(1)

        monkeypatch.setattr(Loopback, "before_read", staticmethod(refill))
        with pytest.raises(TransportError, match="holds generation 0") as stale:
            client.fetch(SlotRef(1, 5, 5000), torch.zeros(5000, dtype=torch.uint8), 10.0)
        assert not stale.value.lost
        assert reads == ([8] if moment == 1 else [8, 5000, 8])


@pytest.mark.usefixtures("loopback")
@pytest.mark.parametrize("moment", [2, 3, 4])
def test_rows_are_read_in_parts_and_a_refill_under_them_is_noticed(
    monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Of 62 rows of 1,000 bytes, two pieces each, with 20,000 bytes at once; and a stretch, which is read as it is."""
    pieces = (
        Piece(100, 0, 62, 30, 1000, 90), Piece(600, 30, 62, 60, 1000, 90), Piece(70_000, 5600, 1, 5000, 5000, 5000),
    )  # fmt: skip
    nbytes = 10_600
    monkeypatch.setattr(cutting, "MOST_BYTES", 20_000)
    with contextlib.closing(LocalHost(Nixl, 2, 80_000)) as host, contextlib.closing(Nixl.client("cpu")) as client:
        client.attach(host.accept(b"one", client.hello()), 10.0)
        host.fill(1, 5, b"rows", 80_000)
        into = torch.zeros(nbytes, dtype=torch.uint8)
        reads: list[int] = []
        monkeypatch.setattr(Loopback, "before_read", staticmethod(lambda source: reads.append(source.nbytes)))
        client.fetch(SlotRef(1, 5, nbytes, pieces), into, 10.0)
        assert bytes(into.numpy()) == bytes(gather(pattern(b"rows", 80_000).data, pieces, 0, nbytes))
        assert reads == [8, 5000, 19_560, 19_560, 19_560, 1_560, 8], "rows are read whole, and what is between them"

        def refill(source: Region) -> None:
            reads.append(source.nbytes)
            if len(reads) == moment:
                host.begin(1)

        reads.clear()
        monkeypatch.setattr(Loopback, "before_read", staticmethod(refill))
        with pytest.raises(TransportError, match="holds generation 0"):
            client.fetch(SlotRef(1, 5, nbytes, pieces), into, 10.0)
        reads.clear()
        monkeypatch.setattr(Loopback, "before_read", staticmethod(lambda source: reads.append(source.nbytes)))
        host.fill(1, 6, b"one stretch", 80_000)
        client.fetch(SlotRef(1, 6, 700, (Piece(4096, 0, 1, 700, 700, 700),)), into, 10.0)
        assert reads == [8, 700, 8]


@pytest.mark.usefixtures("loopback")
def test_a_server_that_answers_no_more_lets_nobody_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(agent: Loopback) -> None:
        raise TransportError("the engine is gone")

    with contextlib.closing(LocalHost(Nixl, 1, 4096)) as host:
        monkeypatch.setattr(Loopback, "progress", fail)
        host.accept(b"one", wrap({"agent": "a"}))
        server = host._server
        assert isinstance(server, NixlServer)
        server._thread.join(10)
        with pytest.raises(TransportError, match="no trainer can connect"):
            host.accept(b"two", wrap({"agent": "b"}))
    assert "trainers can no longer connect" in caplog.text


class DeviceRing:
    """Where a DeviceArena of three slots lies; its memory is this process's own."""

    memory, device, num_slots, slot_bytes, stride = "device", "cuda:1", 3, 5000, 8192

    def __init__(self, ledger: HostArena) -> None:
        self.ledger = ledger
        self.slots = np.zeros(3 * 8192, np.uint8)

    def address(self, slot: int) -> int:
        return int(self.slots.ctypes.data) + slot * 8192

    def word_address(self, slot: int) -> int:
        return self.ledger.word_address(slot, device=True)


@pytest.mark.usefixtures("loopback")
def test_slots_on_a_device_have_their_generations_in_the_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specd.memory.cuda.ordinal", lambda device: 1)
    monkeypatch.setattr(Loopback, "name", "loopback-cuda:1", raising=False)
    with HostArena.create(3, 0, None) as ledger:
        ring = DeviceRing(ledger)
        with contextlib.closing(Nixl.server(ring, ServerContext())) as server:  # type: ignore[arg-type]
            offer = checked(server.accept(b"one", wrap({"agent": "a"})))
            assert (offer.slots.memory, offer.slots.device, offer.words.memory) == ("VRAM", 1, "DRAM")
            assert isinstance(server._agent, Loopback)
            assert all(any(known.covers(part) for known in server._agent.known) for part in (offer.slots, offer.words))
            with contextlib.closing(Nixl.client("cpu")) as client:
                client._agent.name = offer.agent
                client.attach(wrap(offer), 10.0)
                ring.slots[8192 : 8192 + 5000] = 7
                ledger.seal(1, 9)
                into = torch.zeros(5000, dtype=torch.uint8)
                with pytest.raises(TransportError, match="holds generation 0"):
                    client.fetch(SlotRef(1, 9, 5000), into, 1.0)
                ledger.seal(1, 9, device=True)
                client.fetch(SlotRef(1, 9, 5000), into, 1.0)
                assert bool((into == 7).all())


def test_auto_serves_it_where_there_is_an_rdma_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for place in (tmp_path / "missing", tmp_path):
        monkeypatch.setattr("specd.transports.nixl.transport.RDMA_DEVICES", str(place))
        assert (
            Nixl.available("cuda:0") == f"no RDMA device under {place}; without one it is served only where it is named"
        )
    (tmp_path / "mlx5_0").touch()
    assert Nixl.available("cuda:0") is None


@pytest.mark.usefixtures("loopback")
def test_a_client_that_is_not_attached_says_so() -> None:
    client, into = Nixl.client("cpu"), torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(TransportError, match="not attached"):
        client.fetch(SlotRef(0, 1, 8), into, 1.0)
    client.close()
    for _ in range(2):
        with pytest.raises(TransportError, match="not attached, or closed") as refusal:
            client.fetch(SlotRef(0, 1, 8), into, 1.0)
        assert not refusal.value.lost
        client.close()
