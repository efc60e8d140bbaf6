"""Questions to a daemon that need no session."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path

import zmq

from specd import endpoints
from specd.errors import ConfigError, DaemonError, ProtocolError
from specd.paths import check_socket
from specd.protocol import limits
from specd.protocol import messages as wire

Context = zmq.Context[zmq.Socket[bytes]]
LONGEST_S = 86_400.0
"""Longest wait that a person may ask for."""


def dial(
    context: Context, endpoint: str, watch: Callable[[zmq.Socket[bytes]], object] = lambda socket: None
) -> zmq.Socket[bytes]:
    """A socket to a daemon, under a fresh random routing id. Raises ConfigError for an endpoint that is none.

    watch: called with the socket before it connects, so that a monitor misses nothing.
    """
    where = endpoints.resolve_endpoint(endpoint)
    check_owner(where)
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.ROUTING_ID, b"\1" + secrets.token_bytes(15))
    socket.set(zmq.MAXMSGSIZE, limits.MAX_MESSAGE_BYTES)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RECONNECT_IVL, 50)
    socket.set(zmq.RECONNECT_IVL_MAX, 1000)
    socket.set(zmq.HEARTBEAT_IVL, 5000)
    socket.set(zmq.HEARTBEAT_TIMEOUT, 20000)
    # Not for names: libzmq would then take a name's IPv6 addresses alone.
    socket.set(zmq.IPV6, int(where.startswith("tcp://[")))
    watch(socket)
    try:
        socket.connect(where)
    except zmq.ZMQError as error:
        socket.close()
        raise ConfigError(f"endpoint {where}: {error.strerror}; expected ipc://PATH or tcp://HOST:PORT") from None
    return socket


def check_owner(endpoint: str) -> None:
    """Raise ConfigError when an ipc endpoint is another user's. Call it again when it answers: it may be new."""
    if endpoint.startswith("ipc://"):
        check_socket(Path(endpoint.removeprefix("ipc://")))


def waitable(timeout_s: float) -> float:
    """`timeout_s` itself. Raises ConfigError for what no poll can wait: less than nothing, nan, more than LONGEST_S."""
    if not 0 <= timeout_s <= LONGEST_S:
        raise ConfigError(f"a timeout of {timeout_s:g} s: expected a number of seconds, 0 to {LONGEST_S:,.0f}")
    return timeout_s


def ask_status(endpoint: str, timeout_s: float) -> wire.StatusReport:
    """Ask a daemon what it is doing. Raises DaemonError when none answers, ConfigError as `waitable` does."""
    waitable(timeout_s)
    with zmq.Context() as context, dial(context, endpoint) as socket:
        with contextlib.suppress(zmq.Again):  # it hung up for good; nothing will come
            socket.send(wire.encode(wire.Status()), zmq.NOBLOCK)
        if not socket.poll(int(timeout_s * 1000)):
            raise DaemonError(
                f"no daemon answers at {endpoints.resolve_endpoint(endpoint)} within {timeout_s:g} s: start one with "
                f"`specd start --model MODEL`, or name its --endpoint"
            )
        check_owner(endpoints.resolve_endpoint(endpoint))
        reply = wire.decode_reply(socket.recv())
        if not isinstance(reply, wire.StatusReport):
            raise ProtocolError(f"the daemon answered with {type(reply).__name__}, expected StatusReport")
        return reply
