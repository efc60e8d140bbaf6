"""The bulk socket of the bytes transport: hello and offer, where it is bound, how it is reached."""

from __future__ import annotations

import os
import re
import secrets
import socket as sockets
import stat
import time
from pathlib import Path
from typing import Final

import msgspec
import zmq

from specd.curve import zap
from specd.curve.keys import Pair, check_public
from specd.endpoints import address
from specd.errors import ConfigError, TransportError
from specd.memory.arena import MAX_SLOTS
from specd.transports.base import ServerContext
from specd.transports.bytes.frames import CHUNK_BYTES, HEADER_BYTES, WINDOW

TOKEN_BYTES: Final = 16
_MAX_SOCKET_PATH: Final = 107
_ENDPOINT: Final = re.compile(r"ipc:///[^\0]{1,106}|tcp://[][0-9A-Za-z.:%_-]{1,250}:[0-9]{1,5}")
_HEARTBEAT_MS: Final = 5000
_SILENCE_MS: Final = 20000
"""A busy peer may answer a heartbeat late; ZeroMQ's own timeout is one interval."""


class BytesHello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """host: the trainer's boot id. key: the public half of a pair for this attach alone; empty: it uses none."""

    host: str
    key: str = ""


class BytesOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """token: the routing id of this trainer alone. endpoints: best first.

    key: the worker's public key, for its tcp endpoint; empty: it is in the clear.
    """

    token: bytes
    endpoints: tuple[str, ...]
    num_slots: int
    slot_bytes: int
    key: str = ""


def new_token() -> bytes:
    """A routing id that cannot be guessed; libzmq keeps those that start with a zero byte for itself."""
    return b"s" + secrets.token_bytes(TOKEN_BYTES - 1)


def sweep(directory: str) -> list[str]:
    """Unlink the bulk sockets in `directory` whose server is dead: they refuse a connection. Returns their paths."""
    removed: list[str] = []
    for path in Path(directory).glob("bulk-*.sock"):
        try:
            facts = path.lstat()
            # A socket that is just being bound refuses a connection, too.
            if not stat.S_ISSOCK(facts.st_mode) or facts.st_uid != os.getuid() or time.time() - facts.st_mtime < 10:
                continue
            with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM | sockets.SOCK_NONBLOCK) as probe:
                probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            removed.append(str(path))
        except OSError:
            continue  # gone meanwhile, or alive and busy
    return removed


def bind(
    context: zmq.Context[zmq.Socket[bytes]], where: ServerContext, pair: Pair | None = None
) -> tuple[zmq.Socket[bytes], str, str]:
    """The bulk socket and its ipc and tcp endpoints; an endpoint that was not asked for is empty.

    pair: the worker's keys for the tcp endpoint, where the context's `Zap` says who comes in. The ipc one, in this
    user's own directory, is in the clear.
    """
    found = address(where.host)
    if found is not None and found.is_unspecified:
        raise TransportError(f"bytes cannot bind to all interfaces ({where.host}): give the address of one")
    if not where.directory and not where.host:
        raise TransportError("bytes has nowhere to bind: give a directory for its ipc socket or a tcp address")
    socket = context.socket(zmq.ROUTER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.ROUTER_MANDATORY, 1)
    # Only the holder of a token can know it. With keys a token is its key's alone, and nobody takes it over.
    socket.set(zmq.ROUTER_HANDOVER, int(pair is None))
    socket.set(zmq.SNDHWM, 2 * WINDOW + 8)
    # The handshake counts, too.
    socket.set(zmq.MAXMSGSIZE, 4 * HEADER_BYTES if pair is None else zap.HANDSHAKE_BYTES)
    socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)
    ipc = tcp = ""
    try:
        if where.directory:
            sweep(where.directory)
            path = os.path.join(os.path.abspath(where.directory), f"bulk-{secrets.token_hex(8)}.sock")
            if (length := len(os.fsencode(path))) > _MAX_SOCKET_PATH:
                raise TransportError(
                    f"socket path {path!r} has {length} bytes, at most {_MAX_SOCKET_PATH} are possible: "
                    f"use a shorter directory (XDG_RUNTIME_DIR, TMPDIR)"
                )
            ipc = f"ipc://{path}"
            socket.bind(ipc)
            os.chmod(path, 0o600)
        if where.host:
            host = where.host.strip("[]")
            socket.set(zmq.IPV6, int(":" in host))
            if pair is not None:
                zap.guard(socket, pair)
            socket.bind(f"tcp://[{host}]:*" if ":" in host else f"tcp://{host}:*")
            tcp = socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
    except TransportError:
        socket.close()
        raise
    except (zmq.ZMQError, OSError) as error:
        socket.close()
        raise TransportError(
            f"bytes cannot bind in {where.directory!r} or at {where.host!r}: {error.strerror}; expected a directory of "
            f"this user and an address of this host"
        ) from None
    return socket, ipc, tcp


def usable(offer: BytesOffer) -> str:
    """The first endpoint of an offer that can be tried here. Raises TransportError if none, or it makes no sense."""
    if len(offer.token) != TOKEN_BYTES or offer.token[:1] != b"s":
        raise TransportError(
            f"bytes offer with a token of {len(offer.token)} bytes: expected {TOKEN_BYTES}, the first 's'"
        )
    if not (1 <= offer.num_slots <= MAX_SLOTS and 1 <= offer.slot_bytes < 1 << 48):
        raise TransportError(f"bytes offer of {offer.num_slots} slots of {offer.slot_bytes} bytes: out of range")
    if offer.key:
        try:
            check_public(offer.key)
        except ConfigError as error:
            raise TransportError(f"bytes offer: {error}") from None
    for endpoint in offer.endpoints:
        if not _ENDPOINT.fullmatch(endpoint):
            raise TransportError(f"bytes offer of endpoint {endpoint!r}: expected ipc:///PATH or tcp://ADDRESS:PORT")
    for endpoint in offer.endpoints:
        if endpoint.startswith("tcp://") or _can_connect(endpoint.removeprefix("ipc://")):
            return endpoint
    raise TransportError(
        f"none of the daemon's endpoints ({', '.join(offer.endpoints) or 'none'}) can be reached from here: in "
        f"containers, or as another user, share the daemon's runtime directory or give the daemon a tcp endpoint"
    )


def _can_connect(path: str) -> bool:
    """Whether a socket is there and this user may connect to it; the directory of another user hides what it holds."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode) and os.access(path, os.W_OK, effective_ids=True)
    except OSError:
        return False


def connect(
    context: zmq.Context[zmq.Socket[bytes]], endpoint: str, token: bytes, pair: Pair, server: str
) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    """The trainer's end, and a socket that turns readable when the connection is refused or lost.

    pair: the trainer's keys for this attach; server: the worker's public key, empty where none is used. Raises
    TransportError for an endpoint that makes no sense.
    """
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.ROUTING_ID, token)
    socket.set(zmq.RCVHWM, 2 * WINDOW + 8)
    socket.set(zmq.MAXMSGSIZE, CHUNK_BYTES + zap.OVERHEAD_BYTES)
    socket.set(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MS)
    socket.set(zmq.RECONNECT_IVL, -1)  # a lost connection loses chunks: the session has to attach anew
    socket.set(zmq.IPV6, int("[" in endpoint))
    if server and endpoint.startswith("tcp://"):
        zap.prove(socket, pair, server)
    monitor = socket.get_monitor_socket(zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED)
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        socket.disable_monitor()
        monitor.close(linger=0)
        socket.close()
        raise TransportError(f"bytes cannot connect to {endpoint}: {error.strerror}") from None
    return socket, monitor
