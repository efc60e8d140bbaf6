"""The bytes transport: the suite over both kinds of arena, its window, its frames, lost and lying peers."""

from __future__ import annotations

import contextlib
import re
import socket as sockets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

from specd.errors import TransportError
from specd.memory.arena import HostArena
from specd.transports.base import ServerContext, SlotRef
from specd.transports.bytes.frames import CHUNK_BYTES, HEADER_BYTES, WINDOW, Header, Kind, unpack
from specd.transports.bytes.server import Bytes, BytesServer
from specd.transports.bytes.socket import BytesOffer, connect, new_token
from specd.transports.checks import unwrap, wrap
from specd.transports.testing.hosts import Host, LocalHost
from specd.transports.testing.spawned import SpawnedHost
from specd.transports.testing.suite import TransportConformance

TEXT = Path(__file__).parents[2] / "docs" / "protocol.md"


class TestBytes(TransportConformance):
    transport = Bytes


@pytest.mark.usefixtures("gpus")
class TestFromADevice(TransportConformance):
    transport = Bytes

    def host(self) -> Host:
        return LocalHost(self.transport, self.num_slots, self.slot_bytes, device="cuda:0")


class BytesRig:
    """A bytes server over a ring that is larger than the window."""

    slot_bytes = (WINDOW + 3) * CHUNK_BYTES

    def __init__(self, directory: Path) -> None:
        self.directory = directory
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
        first, *payload = peer.recv_multipart()
        header = unpack(first)
        assert header is not None
        assert [len(part) for part in payload] == ([header.length] if header.kind is Kind.CHUNK else [])
        assert header.offset + header.length <= header.total, "more of the slot is sent than the batch fills"
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


def test_bytes_attach_keeps_its_deadline_with_a_peer_that_hangs_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libzmq takes the socket's only pipe away when the connection closes; a send that waits for another never ends."""
    path = str(tmp_path / "bulk-rude.sock")
    offer = wrap(BytesOffer(token=new_token(), endpoints=(f"ipc://{path}",), num_slots=1, slot_bytes=1))

    def connect_and_lose(*where: Any) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        dealer, monitor = connect(*where)
        assert monitor.poll(10_000), "the peer did not hang up"
        return dealer, monitor

    monkeypatch.setattr("specd.transports.bytes.client.connect", connect_and_lose)
    lost: list[bool] = []

    def attach() -> None:
        for _ in range(20):
            client = Bytes.client("cpu")
            with pytest.raises(TransportError, match="connection to the daemon was lost") as error:
                client.attach(offer, 20.0)
            lost.append(error.value.lost)
            client.close()

    with sockets.socket(sockets.AF_UNIX) as rude:
        rude.bind(path)
        rude.listen(20)

        def hang_up_on_all() -> None:
            for _ in range(20):
                rude.accept()[0].close()

        hang_up = threading.Thread(target=hang_up_on_all, daemon=True)
        trainer = threading.Thread(target=attach, daemon=True)
        hang_up.start()
        trainer.start()
        trainer.join(15.0)
        assert lost == [True] * 20
        hang_up.join()


def test_bytes_survives_raw_noise_on_its_socket(bulk: BytesRig) -> None:
    path = bulk.offer().endpoints[0].removeprefix("ipc://")
    for noise in (b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 4096, b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL" + b"\0" * 200):
        with sockets.socket(sockets.AF_UNIX) as raw:
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


@pytest.mark.parametrize("change", [{"token": b"x" * 16}, {"token": b"s"}, {"endpoints": ()}, {"endpoints": ("tcp://*:1",)},
                                    {"endpoints": ("tcp://]]:1",)},
                                    {"endpoints": ("ipc://relative",)}, {"endpoints": ("ipc:///nowhere/x.sock",)},
                                    {"num_slots": 0}, {"slot_bytes": 0}, {"slot_bytes": 1 << 60}])  # fmt: skip
def test_bytes_offers_that_make_no_sense_are_refused(bulk: BytesRig, change: dict[str, object]) -> None:
    client = Bytes.client("cpu")
    with pytest.raises(TransportError):
        client.attach(wrap(msgspec.structs.replace(bulk.offer(), **change)), 0.2)
    client.close()


def test_the_text_says_which_fields_of_a_frame_count(bulk: BytesRig) -> None:
    section = TEXT.read_text().partition("### 8.3 ")[2].partition("### 8.4 ")[0]
    rows = re.findall(r"^\| (\d) \| ([A-Z]+) \| (worker|trainer) \| ([a-z, ]+)", section, re.MULTILINE)
    assert [(int(number), name) for number, name, *_ in rows] == [(kind.value, kind.name) for kind in Kind]
    every = set(Header._fields[1:])
    says = {
        (sender, name): every if fields == "all" else set(fields.split(", ")) - {"none"}
        for _, name, sender, fields in rows
    }
    found: dict[tuple[str, str], set[str]] = {}

    def note(sender: str, *frames: bytes) -> Header:
        header = unpack(frames[0])
        assert header is not None
        fields = {name for name, value in header._asdict().items() if name != "kind" and value}
        found.setdefault((sender, header.kind.name), set()).update(fields)
        return header

    peer = bulk.raw(bulk.offer().token)
    peer.send(Header(Kind.HELLO).pack())
    bulk.arena.seal(1, 3)
    for ref in (SlotRef(1, 3, CHUNK_BYTES + 1), SlotRef(1, 2, 1)):
        bulk.server.publish(b"one", ref)
    for _ in range(4):  # WELCOME, two times CHUNK, GONE
        note("worker", *peer.recv_multipart())

    with contextlib.closing(Bytes.client("cpu")) as client, bulk.context.socket(zmq.ROUTER) as worker:
        worker.set(zmq.RCVTIMEO, 5000)
        endpoint = f"ipc://{bulk.directory}/liar.sock"
        worker.bind(endpoint)
        token = new_token()

        def serve() -> None:
            note("trainer", worker.recv_multipart()[1])
            worker.send_multipart([token, Header(Kind.WELCOME).pack()])
            chunk = Header(Kind.CHUNK, 1, 2, 7, 3, total=2, checksum=1)
            worker.send_multipart([token, chunk.pack(), b"no"])
            for _ in range(2):
                if note("trainer", worker.recv_multipart()[1]).kind is Kind.CANCEL:
                    return

        liar = threading.Thread(target=serve)
        liar.start()
        client.attach(wrap(BytesOffer(token=token, endpoints=(endpoint,), num_slots=2, slot_bytes=2)), 5.0)
        with pytest.raises(TransportError, match="checksum"):
            client.fetch(SlotRef(1, 3, 2), torch.zeros(2, dtype=torch.uint8), 5.0)
        liar.join()
    assert found == says


def test_bytes_sends_no_more_of_a_transfer_that_is_cancelled(bulk: BytesRig) -> None:
    peer = bulk.raw(bulk.offer().token)
    peer.send(Header(Kind.HELLO).pack())
    _taken_chunks(peer, 1)
    bulk.arena.seal(0, 1)
    for nbytes in (bulk.slot_bytes, 10):
        bulk.server.publish(b"one", SlotRef(0, 1, nbytes))
    first = _taken_chunks(peer, WINDOW)[-1]
    peer.send(Header(Kind.CANCEL, transfer=first.transfer).pack())
    peer.send(Header(Kind.TAKEN, total=WINDOW).pack())
    (then,) = _taken_chunks(peer, 1)
    assert (then.transfer, then.offset, then.total) == (first.transfer + 1, 0, 10)


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


def test_bytes_hears_a_peer_that_is_let_in_while_others_are_heard(
    bulk: BytesRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HELLO of a session that was accepted after the thread's last look at its notes, read right behind another."""
    sent, first = threading.Event(), threading.Event()
    send = BytesServer._send

    def send_and_wait(server: BytesServer, *message: Any) -> bool:
        done = send(server, *message)
        if not first.is_set():
            first.set()
            assert sent.wait(10)
            assert server._socket.poll(10_000), "the second HELLO does not come"
        return done

    monkeypatch.setattr(BytesServer, "_send", send_and_wait)
    one = bulk.raw(bulk.offer(b"one").token)
    one.send(Header(Kind.HELLO).pack())
    assert _taken_chunks(one, 1)[0].kind is Kind.WELCOME
    assert first.wait(10)
    two = bulk.raw(bulk.offer(b"two").token)
    two.send(Header(Kind.HELLO).pack())
    sent.set()
    assert _taken_chunks(two, 1)[0].kind is Kind.WELCOME
    assert bulk.server.ignored == 0
