"""The bulk socket of bytes: where it is bound, whom it is offered to, and the suite over TCP."""

from __future__ import annotations

import contextlib
import os
import socket as sockets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from specd.curve import keys
from specd.endpoints import boot_id
from specd.errors import TransportError
from specd.memory.arena import HostArena
from specd.transports.base import ServerContext, SlotRef
from specd.transports.bytes.client import BytesClient
from specd.transports.bytes.server import Bytes
from specd.transports.bytes.socket import BytesOffer, new_token, sweep, usable
from specd.transports.checks import unwrap, wrap
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.suite import TransportConformance, holds


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


class TestBytesKeyed(TransportConformance):
    """Over TCP with keys of either side."""

    transport = _BytesTcp

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes, tcp="127.0.0.1", curve=True)


class _Thief(_OverTcp):
    """A trainer that presents another's offer, and so its token."""

    def __init__(self, stolen: bytes, key: keys.Pair | None = None) -> None:
        super().__init__("cpu")
        self._stolen = stolen
        if key is not None:
            self._pair = key

    def attach(self, offer: bytes, deadline_s: float) -> None:
        super().attach(self._stolen, deadline_s)


def _tcp_offer(offer: bytes) -> BytesOffer:
    found = unwrap(offer, BytesOffer, "offer")
    return msgspec.structs.replace(found, endpoints=found.endpoints[-1:])


@pytest.fixture
def keyed() -> Iterator[LocalHost]:
    with contextlib.closing(LocalHost(_BytesTcp, 2, 4096, tcp="127.0.0.1", curve=True)) as host:
        yield host


def test_a_token_is_of_no_use_to_who_was_not_let_in(keyed: LocalHost) -> None:
    with contextlib.closing(_OverTcp("cpu")) as victim:
        offer = keyed.accept(b"victim", victim.hello())
        with contextlib.closing(_Thief(offer)) as stranger, pytest.raises(TransportError, match="lost"):
            stranger.attach(b"", 10.0)
        clear = wrap(msgspec.structs.replace(_tcp_offer(offer), key=""))
        with contextlib.closing(_Thief(clear)) as keyless, pytest.raises(TransportError, match="lost"):
            keyless.attach(b"", 10.0)
        victim.attach(offer, 10.0)  # none of them has used it up


@pytest.mark.parametrize("first", [False, True])
def test_a_token_is_of_no_use_to_another_session(keyed: LocalHost, first: bool) -> None:
    """Not even to one that is let in, whether it comes before its owner or after: the owner alone gets the states."""
    into, other = torch.zeros(4096, dtype=torch.uint8), torch.zeros(4096, dtype=torch.uint8)
    with contextlib.closing(_OverTcp("cpu")) as victim, contextlib.closing(_OverTcp("cpu")) as mine:
        offer = keyed.accept(b"victim", victim.hello())
        own = keyed.accept(b"thief", mine.hello())
        if not first:
            victim.attach(offer, 10.0)
        with contextlib.closing(_Thief(offer, mine._pair)) as thief:
            with pytest.raises(TransportError, match=r"bytes: .* had not answered"):
                thief.attach(b"", 0.3)
            if first:
                victim.attach(offer, 10.0)
            mine.attach(own, 10.0)
            keyed.fill(0, 1, b"secret", 4096)
            keyed.publish(b"victim", SlotRef(0, 1, 4096))
            victim.fetch(SlotRef(0, 1, 4096), into, 10.0)
            with pytest.raises(TransportError):
                mine.fetch(SlotRef(0, 1, 4096), other, 0.1)
    assert holds(into, b"secret")
    assert not other.any()


def test_a_worker_that_is_not_the_daemons_is_not_talked_to(keyed: LocalHost) -> None:
    """Whoever listens at the daemon's port, or stands between, has not the key that the offer names."""
    with contextlib.closing(_OverTcp("cpu")) as trainer:
        offer = _tcp_offer(keyed.accept(b"one", trainer.hello()))
        forged = msgspec.structs.replace(offer, key=keys.draw().public)
        with pytest.raises(TransportError, match="lost"):
            trainer.attach(wrap(forged), 10.0)


def test_a_trainer_without_a_key_is_told_so(keyed: LocalHost) -> None:
    with pytest.raises(TransportError, match="the trainer uses no keys over bytes, and the daemon asks for them"):
        keyed.accept(b"one", wrap({"host": boot_id()}))


def test_an_offer_with_a_key_that_is_none_is_refused(keyed: LocalHost) -> None:
    with contextlib.closing(_OverTcp("cpu")) as trainer:
        offer = _tcp_offer(keyed.accept(b"one", trainer.hello()))
        with pytest.raises(TransportError, match="bytes offer: public key 'no key' of 6 characters"):
            trainer.attach(wrap(msgspec.structs.replace(offer, key="no key")), 10.0)


def test_a_session_that_is_dropped_is_not_let_in_again(keyed: LocalHost) -> None:
    with contextlib.closing(_OverTcp("cpu")) as trainer:
        offer = keyed.accept(b"one", trainer.hello())
        keyed.drop(b"one")
        with pytest.raises(TransportError, match="lost"):
            trainer.attach(offer, 10.0)


def test_bytes_sweeps_dead_sockets_only(tmp_path: Path) -> None:
    live = sockets.socket(sockets.AF_UNIX)
    live.bind(str(tmp_path / "bulk-live.sock"))
    live.listen()
    os.utime(tmp_path / "bulk-live.sock", (0, 0))
    for name in ("bulk-dead.sock", "other.sock", "bulk-young.sock"):
        with sockets.socket(sockets.AF_UNIX) as dead:
            dead.bind(str(tmp_path / name))
        if name != "bulk-young.sock":
            os.utime(tmp_path / name, (0, 0))
    with live:
        assert sweep(str(tmp_path)) == [str(tmp_path / "bulk-dead.sock")]


@pytest.mark.parametrize(
    ("where", "match"),
    [
        (ServerContext(), "nowhere to bind"),
        (ServerContext(host="0.0.0.0"), "all interfaces"),
        (ServerContext(host="[::]"), "all interfaces"),
        (ServerContext(host="203.0.113.7"), "cannot bind"),
        (ServerContext(directory="/nonexistent"), "cannot bind"),
        (ServerContext(directory="/tmp/" + "x" * 100), "at most 107"),
    ],
)
def test_bytes_says_why_it_cannot_bind(where: ServerContext, match: str) -> None:
    with HostArena.create(1, 4096, None) as arena, pytest.raises(TransportError, match=match):
        Bytes.server(arena, where)


@pytest.mark.parametrize("device", ["cuda:63", "mps"])
def test_bytes_client_refuses_a_device_that_is_not_here(device: str) -> None:
    with pytest.raises(TransportError, match=f"device {device} "):
        Bytes.client(device)


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


def test_another_user_takes_the_tcp_endpoint(tmp_path: Path) -> None:
    hidden = tmp_path / "run"
    hidden.mkdir(mode=0o700)
    with sockets.socket(sockets.AF_UNIX) as bulk:
        bulk.bind(str(hidden / "bulk-1.sock"))
        offer = BytesOffer(
            token=new_token(), endpoints=(f"ipc://{hidden}/bulk-1.sock", "tcp://127.0.0.1:7"), num_slots=1, slot_bytes=1
        )
        assert usable(offer) == offer.endpoints[0]
        with somebody_else(hidden):
            assert usable(offer) == offer.endpoints[1]
            with pytest.raises(TransportError, match="as another user"):
                usable(msgspec.structs.replace(offer, endpoints=offer.endpoints[:1]))


@contextlib.contextmanager
def somebody_else(directory: Path) -> Iterator[None]:
    """A user who may not look into `directory`."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    else:
        directory.chmod(0)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        directory.chmod(0o700)


def test_bytes_serves_no_ledger_without_slots(tmp_path: Path) -> None:
    with HostArena.create(1, 0, None) as ledger, pytest.raises(TransportError, match="host memory"):
        Bytes.server(ledger, ServerContext(directory=str(tmp_path)))
