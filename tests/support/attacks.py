"""Attackers: a process that does one bad thing to a daemon for some seconds, paced or as fast as it can.

`python attacks.py ENDPOINT KIND SECONDS MESSAGES_A_SECOND [SERVER]` prints how many it tried to send; 0 a second is
unpaced. SERVER: public key of a daemon that asks for keys; the attacker has one that is not let in.
"""

from __future__ import annotations

import contextlib
import itertools
import socket as sockets
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import zmq

from specd.protocol import limits
from specd.protocol import messages as wire
from specd.protocol.capture import CaptureSpec

PEERS = 4
UNREAD = 16
"""Connections that are held without being read."""
SPEC = CaptureSpec(taps=(1,), dtype="float32")
HEAD = bytes((wire.VERSION,))
FRAME = 128 << 10
"""What any daemon takes."""


class Attacker:
    """Some connections to a daemon, opened anew when they do not take a message."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, server: str = "") -> None:
        self._context = context
        self._server = server
        self._public, self._secret = zmq.curve_keypair()
        self._endpoint = endpoint
        self._peers: list[zmq.Socket[bytes]] = []
        self.tried = 0

    def peer(self, number: int) -> zmq.Socket[bytes]:
        """The nth connection."""
        while len(self._peers) <= number:
            socket = self._context.socket(zmq.DEALER)
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.SNDHWM, 100)
            socket.set(zmq.RECONNECT_IVL, 10)
            if self._server:
                socket.set(zmq.CURVE_SERVERKEY, self._server.encode())
                socket.set(zmq.CURVE_PUBLICKEY, self._public)
                socket.set(zmq.CURVE_SECRETKEY, self._secret)
            socket.connect(self._endpoint)
            self._peers.append(socket)
        return self._peers[number]

    def send(self, number: int, frame: bytes, flags: int = 0) -> bool:
        """Send over the nth connection; False if it takes no more now."""
        self.tried += 1
        with contextlib.suppress(zmq.Again):
            self.peer(number).send(frame, zmq.NOBLOCK | flags, copy=len(frame) < FRAME)
            return True
        return False

    def hear(self, number: int) -> None:
        """Take what a connection was sent."""
        with contextlib.suppress(zmq.Again):
            while True:
                self.peer(number).recv(zmq.NOBLOCK)

    def drop(self, number: int) -> None:
        """Close the nth connection."""
        self.peer(number).close()
        del self._peers[number]

    def knock(self) -> None:
        """Connect over TCP, say something that is no greeting, and leave."""
        host, _, port = self._endpoint.removeprefix("tcp://").rpartition(":")
        with contextlib.suppress(OSError), sockets.create_connection((host, int(port)), 1.0) as socket:
            socket.send(b"x" * 64)
            self.tried += 1


def hello(**fields: Any) -> bytes:
    form = wire.Hello(name="attacker", host="elsewhere", pid=0, transports=("bytes",), spec=SPEC, credits=1)
    return HEAD + msgspec.msgpack.encode(msgspec.msgpack.decode(wire.encode(form)[1:]) | fields)


def taps(attacker: Attacker) -> Iterator[None]:
    """HELLOs whose list of taps fills a frame: each item is one byte."""
    frame = hello(spec={"taps": [1] * (FRAME - 1000)})
    for turn in itertools.count():
        attacker.send(turn % PEERS, frame)
        attacker.hear(turn % PEERS)
        yield


def oversized(attacker: Attacker) -> Iterator[None]:
    """Frames far beyond what is taken."""
    frame = HEAD + bytes(limits.MAX_MESSAGE_BYTES - 1)
    for turn in itertools.count():
        attacker.send(turn % PEERS, frame)
        yield


def endless(attacker: Attacker) -> Iterator[None]:
    """Multipart messages that never end."""
    for turn in itertools.count():
        attacker.send(turn % PEERS, bytes(4096), zmq.SNDMORE)
        yield


def flood(attacker: Attacker) -> Iterator[None]:
    """STATUS, and no reading of what it says."""
    frame = wire.encode(wire.Status())
    for turn in itertools.count():
        attacker.send(turn % PEERS, frame)
        yield


def forged(attacker: Attacker) -> Iterator[None]:
    """SUBMITs of as many tokens as a frame takes, with a wrong id, in a session."""
    attacker.send(0, hello())
    epoch = b""
    ones = b"\1\0\0\0" * ((FRAME - 1000) // 8)
    while True:
        with contextlib.suppress(zmq.Again):
            epoch = wire.decode_reply(attacker.peer(0).recv(zmq.NOBLOCK)).epoch
        attacker.hear(0)
        attacker.send(0, wire.encode(wire.Submit(epoch=epoch, seq=1, batch_id=bytes(16), tokens=ones, lengths=ones)))
        yield


def unread(attacker: Attacker) -> Iterator[None]:
    """Sessions that ask for the embedding and do not read it, one connection after another."""
    for number in itertools.count():
        if number >= UNREAD:
            attacker.drop(0)
        newest = min(number, UNREAD - 1)
        attacker.send(newest, hello())
        if not attacker.peer(newest).poll(1000):
            yield
            continue
        epoch = wire.decode_reply(attacker.peer(newest).recv()).epoch
        fetch = wire.encode(wire.Fetch(epoch=epoch, name="embedding", offset=0, length=limits.ARTIFACT_CHUNK_BYTES))
        for _ in range(4 * limits.MAX_FETCHES):
            attacker.send(newest, fetch)
            yield


def knocks(attacker: Attacker) -> Iterator[None]:
    """Connections that come and go."""
    while True:
        attacker.knock()
        yield


KINDS: dict[str, Callable[[Attacker], Iterator[None]]] = {
    kind.__name__: kind for kind in (taps, oversized, endless, flood, forged, unread, knocks)
}


LOCAL = [kind for kind in KINDS if kind not in ("endless", "knocks")]
"""What a process that is let in over ipc can try. Messages that never end are left out: libzmq keeps them whole."""
STRANGE = ["taps", "oversized", "endless", "flood", "knocks"]
"""What a stranger at a TCP port can try."""


def main(endpoint: str, kind: str, seconds: float, rate: float, server: str = "") -> int:
    """Attack; returns how many messages it tried to send."""
    with zmq.Context() as context:
        attacker = Attacker(context, endpoint, server)
        began = time.monotonic()
        for number, _ in enumerate(KINDS[kind](attacker), 1):
            now = time.monotonic() - began
            if now > seconds:
                break
            if rate and number / rate > now:
                time.sleep(number / rate - now)  # the pace is what is tried
        context.destroy(linger=0)
        return attacker.tried


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), *sys.argv[5:]))
