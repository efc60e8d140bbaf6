"""The built-in transports against the conformance suite, and what each promises beyond it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
import zmq

from specd.arena import HostArena
from specd.errors import TransportError
from specd.transport import ServerContext, SlotRef, load, unwrap, wrap
from specd.transports.bulk import BytesOffer, sweep
from specd.transports.bytes import Bytes, BytesServer
from specd.transports.bytes_client import BytesClient
from specd.transports.conformance import Rig, TransportConformance, holds
from specd.transports.frames import CHUNK_BYTES, HEADER_BYTES, WINDOW, Header, Kind, unpack
from specd.transports.host import Host, LocalHost, SpawnedHost
from specd.transports.inproc import Inproc
from specd.transports.shm import Shm, ShmOffer


class TestInproc(TransportConformance):
    transport = Inproc


class TestShm(TransportConformance):
    transport = Shm


class TestBytes(TransportConformance):
    transport = Bytes


class _OverTcp(BytesClient):
    """A trainer that believes it is on another host."""

    def hello(self) -> bytes:
        return wrap({"host": "elsewhere"})


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


class BytesRig:
    """A bytes server over a ring that is larger than the window."""

    slot_bytes = (WINDOW + 3) * CHUNK_BYTES

    def __init__(self, directory: Path) -> None:
        self.arena = HostArena.create(2, self.slot_bytes, None)
        self.server: BytesServer = Bytes.server(self.arena, ServerContext(directory=str(directory)))
        self.context = zmq.Context()
        self.peers: list[zmq.Socket[bytes]] = []

    def offer(self, session: bytes = b"one") -> BytesOffer:
        hello = Bytes.client("cpu").hello()
        return unwrap(self.server.accept(session, hello), BytesOffer, "offer")

    def raw(self, token: bytes) -> zmq.Socket[bytes]:
        """A peer that speaks as it likes."""
        peer = self.context.socket(zmq.DEALER)
        self.peers.append(peer)
        peer.set(zmq.LINGER, 1000)
        peer.set(zmq.ROUTING_ID, token)
        peer.set(zmq.RCVTIMEO, 5000)
        peer.connect(self.offer(b"spare").endpoints[0])
        return peer

    def close(self) -> None:
        for peer in self.peers:
            peer.close(linger=0)
        self.context.term()
        self.server.close()
        self.arena.close()


@pytest.fixture
def bulk(tmp_path: Path) -> Iterator[BytesRig]:
    rig = BytesRig(tmp_path)
    try:
        yield rig
    finally:
        rig.close()


def _taken_chunks(peer: zmq.Socket[bytes], count: int) -> list[Header]:
    headers = []
    for _ in range(count):
        header = unpack(peer.recv_multipart()[0])
        assert header is not None
        headers.append(header)
    return headers


def test_bytes_window_bounds_what_is_under_way(bulk: BytesRig) -> None:
    peer = bulk.raw(bulk.offer().token)
    peer.send(Header(Kind.HELLO).pack())
    assert _taken_chunks(peer, 1)[0].kind is Kind.WELCOME
    bulk.arena.seal(0, 1)
    bulk.server.publish(b"one", SlotRef(0, 1, bulk.slot_bytes))
    offsets = [header.offset for header in _taken_chunks(peer, WINDOW)]
    assert offsets == [k * CHUNK_BYTES for k in range(WINDOW)]
    peer.set(zmq.RCVTIMEO, 200)
    with pytest.raises(zmq.Again):
        peer.recv()
    peer.set(zmq.RCVTIMEO, 5000)
    peer.send(Header(Kind.TAKEN, total=WINDOW).pack())
    assert [header.offset for header in _taken_chunks(peer, 3)] == [(WINDOW + k) * CHUNK_BYTES for k in range(3)]


def test_bytes_notices_a_refill_between_two_windows(bulk: BytesRig) -> None:
    peer = bulk.raw(bulk.offer().token)
    peer.send(Header(Kind.HELLO).pack())
    _taken_chunks(peer, 1)
    bulk.arena.seal(0, 1)
    bulk.server.publish(b"one", SlotRef(0, 1, bulk.slot_bytes))
    _taken_chunks(peer, WINDOW)
    bulk.arena.seal(0, 2)
    peer.send(Header(Kind.TAKEN, total=WINDOW).pack())
    gone = _taken_chunks(peer, 1)[0]
    assert (gone.kind, gone.slot, gone.generation) == (Kind.GONE, 0, 1)


def test_bytes_client_refuses_altered_payload(tmp_path: Path) -> None:
    """A server that lies: right header, wrong bytes."""
    context = zmq.Context()
    server = context.socket(zmq.ROUTER)
    server.bind(f"ipc://{tmp_path}/liar.sock")
    client = Bytes.client("cpu")
    token = b"s" * 16
    offer = BytesOffer(token=token, endpoints=(f"ipc://{tmp_path}/liar.sock",), num_slots=1, slot_bytes=4096)

    def lie() -> None:
        server.recv_multipart()
        server.send_multipart([token, b"\0" * HEADER_BYTES])
        server.send_multipart([token, b"noise", b"more", b"noise"])
        server.send_multipart([token, Header(Kind.WELCOME).pack()])
        chunk = Header(Kind.CHUNK, slot=0, length=16, transfer=1, generation=1, total=16, checksum=1)
        server.send_multipart([token, chunk._replace(slot=5).pack(), b"x" * 16])
        server.send_multipart([token, chunk._replace(offset=8).pack(), b"x" * 16])
        server.send_multipart([token, chunk._replace(length=17).pack(), b"x" * 17])
        server.send_multipart([token, chunk.pack()])
        server.send_multipart([token, chunk.pack(), b"x" * 16])

    liar = threading.Thread(target=lie)
    liar.start()
    try:
        client.attach(wrap(offer), 5.0)
        into = torch.zeros(16, dtype=torch.uint8)
        with pytest.raises(TransportError, match="checksum"):
            client.fetch(SlotRef(0, 1, 16), into, 5.0)
        assert client.ignored == 6
    finally:
        liar.join()
        client.close()
        server.close(linger=0)
        context.term()


def test_bytes_ignores_strangers_and_noise(bulk: BytesRig) -> None:
    stranger = bulk.raw(b"s" + b"?" * 15)
    for frames in ([Header(Kind.HELLO).pack()], [b""], [b"noise"], [Header(Kind.HELLO).pack(), b"more"], [b"\0" * 56]):
        stranger.send_multipart(frames)
    peer = bulk.raw(bulk.offer().token)
    for frame in (b"noise", Header(Kind.TAKEN, total=9).pack(), Header(Kind.CHUNK).pack(), b"\xff" * HEADER_BYTES):
        peer.send(frame)
    peer.send(Header(Kind.HELLO).pack())
    assert _taken_chunks(peer, 1)[0].kind is Kind.WELCOME
    bulk.arena.seal(0, 1)
    bulk.server.publish(b"one", SlotRef(0, 1, 100))
    assert _taken_chunks(peer, 1)[0].kind is Kind.CHUNK
    assert bulk.server.ignored >= 4
    stranger.set(zmq.RCVTIMEO, 100)
    with pytest.raises(zmq.Again):
        stranger.recv()


def test_bytes_client_notices_at_once_that_the_worker_died() -> None:
    host = SpawnedHost("bytes", 1, 1 << 20)
    client = Bytes.client("cpu")
    try:
        offer = host.accept(b"one", client.hello())
        client.attach(offer, 10.0)
        threading.Thread(target=host.kill).start()
        begin = time.monotonic()
        for _ in range(2):
            with pytest.raises(TransportError, match="connection to the daemon was lost") as lost:
                client.fetch(SlotRef(0, 1, 100), torch.zeros(100, dtype=torch.uint8), 60.0)
            assert lost.value.lost
        assert time.monotonic() - begin < 30.0
        with pytest.raises(TransportError, match="was lost"):
            client.attach(offer, 60.0)
    finally:
        client.close()
        host.close()


def test_bytes_survives_raw_noise_on_its_socket(bulk: BytesRig) -> None:
    path = bulk.offer().endpoints[0].removeprefix("ipc://")
    for noise in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 4096, b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 200):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(path)
            raw.sendall(noise)
    client = Bytes.client("cpu")
    client.attach(wrap(bulk.offer()), 5.0)
    bulk.arena.seal(0, 1)
    bulk.server.publish(b"one", SlotRef(0, 1, 100))
    client.fetch(SlotRef(0, 1, 100), torch.zeros(100, dtype=torch.uint8), 5.0)
    client.close()


def test_bytes_socket_is_private_and_removed(tmp_path: Path) -> None:
    rig = BytesRig(tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    rig.close()
    assert not list(tmp_path.iterdir())


def test_bytes_sweeps_dead_sockets_only(tmp_path: Path) -> None:
    live = socket.socket(socket.AF_UNIX)
    live.bind(str(tmp_path / "bulk-live.sock"))
    live.listen()
    os.utime(tmp_path / "bulk-live.sock", (0, 0))
    for name in ("bulk-dead.sock", "other.sock", "bulk-young.sock"):
        with socket.socket(socket.AF_UNIX) as dead:
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
        (ServerContext(host="203.0.113.7"), "cannot bind"),
        (ServerContext(directory="/nonexistent"), "cannot bind"),
        (ServerContext(directory="/tmp/" + "x" * 100), "at most 107"),
    ],
)
def test_bytes_says_why_it_cannot_bind(where: ServerContext, match: str) -> None:
    with HostArena.create(1, 4096, None) as arena, pytest.raises(TransportError, match=match):
        Bytes.server(arena, where)


def test_bytes_without_tcp_refuses_a_trainer_elsewhere(bulk: BytesRig) -> None:
    with pytest.raises(TransportError, match="another host"):
        bulk.server.accept(b"far", wrap({"host": "elsewhere"}))


@pytest.mark.parametrize("change", [{"token": b"x" * 16}, {"token": b"s"}, {"endpoints": ()}, {"endpoints": ("tcp://*:1",)},
                                    {"endpoints": ("ipc://relative",)}, {"endpoints": ("ipc:///nowhere/x.sock",)},
                                    {"num_slots": 0}, {"slot_bytes": 0}, {"slot_bytes": 1 << 60}])  # fmt: skip
def test_bytes_offers_that_make_no_sense_are_refused(bulk: BytesRig, change: dict[str, object]) -> None:
    client = Bytes.client("cpu")
    with pytest.raises(TransportError):
        client.attach(wrap(msgspec.structs.replace(bulk.offer(), **change)), 0.2)
    client.close()


def test_frames_have_golden_bytes() -> None:
    header = Header(Kind.CHUNK, 1, 2, 3, 4, 5, 6, 7)
    assert header.pack().hex() == (
        "73706342"
        "01"
        "03"
        "0000"
        "01000000"
        "02000000"
        "0300000000000000"
        "0400000000000000"
        "0500000000000000"
        "0600000000000000"
        "0700000000000000"
    )
    assert unpack(header.pack()) == header
    for position, value in ((0, 0), (4, 2), (5, 0), (5, 7), (6, 1)):
        frame = bytearray(header.pack())
        frame[position] = value
        assert unpack(bytes(frame)) is None
    assert unpack(b"") is None


def test_a_host_that_cannot_start_says_why() -> None:
    with pytest.raises(TransportError, match="unknown transport"):
        SpawnedHost("carrier-pigeon", 1, 4096)
