"""The built-in transports against the conformance suite, and what each promises beyond it."""

from __future__ import annotations

import contextlib
import os
import socket as sockets
from pathlib import Path

import msgspec
import pytest
import torch

from specd.errors import TransportError
from specd.memory.arena import HostArena
from specd.transports.base import ServerContext, SlotRef
from specd.transports.bytes.client import BytesClient
from specd.transports.bytes.server import Bytes
from specd.transports.bytes.socket import BytesOffer
from specd.transports.checks import unwrap, wrap
from specd.transports.inproc import Inproc
from specd.transports.registry import load
from specd.transports.shm import Shm, ShmOffer
from specd.transports.testing.hosts import Host, LocalHost, SpawnedHost
from specd.transports.testing.suite import Rig, TransportConformance, holds


class TestInproc(TransportConformance):
    transport = Inproc


class TestShm(TransportConformance):
    transport = Shm


class TestBytes(TransportConformance):
    transport = Bytes


class _OverTcp(BytesClient):
    """A trainer that does not see the daemon's directory, as in a container that shares the network only."""

    def attach(self, offer: bytes, deadline_s: float) -> None:
        found = unwrap(offer, BytesOffer, "offer")
        tcp = tuple(endpoint for endpoint in found.endpoints if endpoint.startswith("tcp://"))
        super().attach(wrap(msgspec.structs.replace(found, endpoints=tcp)), deadline_s)


class _BytesTcp(Bytes):
    @staticmethod
    def client(device: str) -> BytesClient:
        return _OverTcp(device)


class TestBytesTcp(TransportConformance):
    transport = _BytesTcp

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes, tcp="127.0.0.1")


@pytest.mark.parametrize("name", ["shm", "bytes"])
def test_from_another_process(name: str) -> None:
    """The calls of the suite that matter across a process border, with one child for all of them."""
    suite = TransportConformance()
    rig = Rig(load(name), "cpu", SpawnedHost(name, suite.num_slots, suite.slot_bytes))
    suite.transport = rig.transport  # type: ignore[misc]
    try:
        suite.test_bytes_are_exact_at_every_size(rig)
        suite.test_a_refill_under_way_is_noticed(rig)
        suite.test_two_sessions_do_not_disturb_each_other(rig)
        suite.test_garbage_is_refused(rig)
        suite.test_a_dropped_session_gets_nothing(rig)
    finally:
        rig.close()


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


def test_shm_serves_no_ledger_without_slots() -> None:
    with HostArena.create(1, 0, "ab" * 16) as ledger:
        for transport in (Shm, Bytes):
            with pytest.raises(TransportError, match="host memory"):
                transport.server(ledger, ServerContext(directory="/tmp"))


def test_a_host_that_cannot_start_says_why() -> None:
    with pytest.raises(TransportError, match="unknown transport"):
        SpawnedHost("carrier-pigeon", 1, 4096)


@pytest.mark.usefixtures("ipv6")
def test_bytes_over_ipv6() -> None:
    with contextlib.closing(LocalHost(_BytesTcp, 1, 4096, tcp="::1")) as host:
        client = _OverTcp("cpu")
        offer = host.accept(b"one", client.hello())
        assert "tcp://[::1]:" in unwrap(offer, BytesOffer, "offer").endpoints[-1]
        client.attach(offer, 10.0)
        host.fill(0, 1, b"six", 4096)
        host.publish(b"one", SlotRef(0, 1, 4096))
        into = torch.zeros(4096, dtype=torch.uint8)
        client.fetch(SlotRef(0, 1, 4096), into, 10.0)
        assert holds(into, b"six")
        client.close()


FAR = wrap({"host": "elsewhere"})
"""The hello of a trainer on another host."""


@pytest.mark.parametrize("tcp", ["", "127.0.0.1", "127.0.0.2", "localhost"])
def test_bytes_sends_no_trainer_elsewhere_to_its_own_loopback(tcp: str) -> None:
    with contextlib.closing(LocalHost(Bytes, 1, 4096, tcp=tcp)) as host:
        with pytest.raises(TransportError, match=r"another host .* --endpoint tcp://ADDRESS:PORT"):
            host.accept(b"far", FAR)
        near = unwrap(host.accept(b"near", Bytes.client("cpu").hello()), BytesOffer, "offer")
        assert [endpoint[:3] for endpoint in near.endpoints] == (["ipc", "tcp"] if tcp else ["ipc"])


def test_bytes_offers_a_trainer_elsewhere_the_address_alone() -> None:
    with sockets.socket(sockets.AF_INET, sockets.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing, and finds the interface that would
        except OSError:
            pytest.skip("needs a network interface beside loopback")
        own = probe.getsockname()[0]
    with contextlib.closing(LocalHost(Bytes, 1, 4096, tcp=own)) as host:
        (endpoint,) = unwrap(host.accept(b"far", FAR), BytesOffer, "offer").endpoints
        assert endpoint.startswith(f"tcp://{own}:")
