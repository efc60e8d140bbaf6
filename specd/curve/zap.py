"""CURVE on sockets: options of either side, and the answer to libzmq's question about each peer (ZAP, ZeroMQ RFC 27).

All options are read when a socket is bound or connected: what it was bound to before stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import zmq
from zmq.utils import z85

from specd.curve.keys import Pair

ENDPOINT = "inproc://zeromq.zap.01"
HANDSHAKE_MS = 5000
"""A peer that has not proven its key by then is disconnected."""
OVERHEAD_BYTES = 64
"""What CURVE adds to a frame, at most: MAXMSGSIZE counts it."""
HANDSHAKE_BYTES = 1024
"""Least MAXMSGSIZE that lets a handshake through."""
_DOMAIN = b"specd"

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]


class Zap:
    """The handler of one context. To be there before a guarded socket is bound, and used on its thread alone.

    allowed: whether the holder of a public key may connect. Poll `socket`, and call `handle` when it is readable.
    """

    def __init__(self, context: Context, allowed: Callable[[str], bool]) -> None:
        self._allowed = allowed
        self.socket = context.socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(ENDPOINT)

    def handle(self, limit: int = 100) -> None:
        """Answer up to `limit` of the questions that are there."""
        for _ in range(limit):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self._answer(frames))

    def close(self) -> None:
        """From now on nobody is let in."""
        self.socket.close(linger=0)

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        """version, request, status, text, user id, metadata; of a question: …, domain, address, id, mechanism, key."""
        version, request = (*frames, b"", b"")[:2]
        if version == b"1.0" and len(frames) == 7 and frames[5] == b"CURVE" and len(frames[6]) == 32:
            public = z85.encode(frames[6]).decode()
            if self._allowed(public):
                return [version, request, b"200", b"OK", public.encode(), b""]
        return [b"1.0", request, b"400", b"this key is not let in", b"", b""]


def guard(socket: Socket, pair: Pair) -> None:
    """Let in at the endpoints that `socket` is bound to from now on only who the context's `Zap` allows."""
    socket.set(zmq.CURVE_SECRETKEY, pair.secret.encode())
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.ZAP_DOMAIN, _DOMAIN)
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a handler nobody comes in; libzmq's default lets everybody
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def prove(socket: Socket, pair: Pair, server: str) -> None:
    """Connect from now on as the holder of `pair`, and to the holder of the public key `server` alone."""
    socket.set(zmq.CURVE_SERVERKEY, server.encode())
    socket.set(zmq.CURVE_PUBLICKEY, pair.public.encode())
    socket.set(zmq.CURVE_SECRETKEY, pair.secret.encode())


def user_of(frame: zmq.Frame) -> str:
    """The public key of who sent a frame, as proven when it connected; empty where no key was asked for."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:  # its connection has none
        return ""
