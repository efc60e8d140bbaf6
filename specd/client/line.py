"""A line to a daemon: its socket, who the trainer is to it, and why no answer comes."""

from __future__ import annotations

import contextlib
import errno
import secrets
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import zmq
from zmq.utils.monitor import recv_monitor_message

from specd.config.settings import TrainerAuth
from specd.curve import keys, zap
from specd.curve.keys import Pair
from specd.endpoints import resolve_endpoint
from specd.errors import ConfigError, RejectedError
from specd.paths import check_socket
from specd.protocol import limits

EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
SUSPICIOUS = 2
"""Handshakes that end without a word, one after another, before that is a problem: one daemon may just have ended."""


Context = zmq.Context[zmq.Socket[bytes]]


class Identity(NamedTuple):
    """Who a trainer is over TCP, and whom it trusts: the public key of the daemon at each endpoint."""

    own: Pair
    servers: Mapping[str, str]

    def server(self, endpoint: str) -> str:
        """The public key of the daemon at a tcp endpoint, empty for another. Raises ConfigError where none is known."""
        if not endpoint.startswith("tcp://"):
            return ""
        if (public := self.servers.get(endpoint, "")) == "":
            raise ConfigError(
                f"no key of the daemon at {endpoint} is known: expected its public key, as printed when it was made, "
                f"with --server-key PUBLIC or in auth.servers; none is trusted on first use"
            )
        return public


def identity(auth: TrainerAuth | None, endpoints: Iterable[str]) -> Identity | None:
    """The identity that settings ask for. Raises ConfigError for a key that cannot be used, or an unknown daemon."""
    if auth is None:
        return None
    servers = {
        resolve_endpoint(endpoint): keys.check_public(public, f"auth.servers: the key of {endpoint},")
        for endpoint, public in auth.servers.items()
    }
    found = Identity(keys.load(auth.key), servers)
    for endpoint in endpoints:
        found.server(resolve_endpoint(endpoint))
    return found


class Line:
    """A socket to a daemon, under a fresh random routing id, watched until it is known whether it takes this trainer.

    monitor: readable when something became of the connection, which `events` looks at. connected: whether the daemon
    took it. hung_up: how many handshakes, one after another, it ended without a word. Raises ConfigError for an
    endpoint that is none, or another user's, or without a key of the daemon there.
    """

    def __init__(self, context: Context, endpoint: str, identity: Identity | None = None) -> None:
        self.connected = False
        self._endpoint = where = resolve_endpoint(endpoint)
        self._identity = identity
        self.hung_up = 0
        self.check_owner()
        server = identity.server(where) if identity else ""
        self.socket = context.socket(zmq.DEALER)
        self.socket.set(zmq.ROUTING_ID, b"\1" + secrets.token_bytes(15))
        self.socket.set(zmq.MAXMSGSIZE, limits.MAX_MESSAGE_BYTES + zap.OVERHEAD_BYTES)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RECONNECT_IVL, 50)
        self.socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        self.socket.set(zmq.HEARTBEAT_IVL, 5000)
        self.socket.set(zmq.HEARTBEAT_TIMEOUT, 20000)
        # Not for names: libzmq would then take a name's IPv6 addresses alone.
        self.socket.set(zmq.IPV6, int(where.startswith("tcp://[")))
        if identity is not None and server:
            zap.prove(self.socket, identity.own, server)
        # Not `get_monitor_socket`: the keeper of a session calls it, for the same address, perhaps too soon.
        events = f"inproc://specd-line-{secrets.token_hex(8)}"
        self.socket.monitor(events, EVENTS)
        self.monitor = context.socket(zmq.PAIR)
        self.monitor.connect(events)
        try:
            self.socket.connect(where)
        except zmq.ZMQError as error:
            self.release().close()
            raise ConfigError(f"endpoint {where}: {error.strerror}; expected ipc://PATH or tcp://HOST:PORT") from None
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self.monitor, zmq.POLLIN)

    def wait(self, deadline_s: float) -> bool:
        """Wait for a message; False when none came within `deadline_s`.

        Raises RejectedError when the daemon refuses this trainer, or either side's keys, for good.
        """
        limit = time.monotonic() + deadline_s
        while True:
            events = dict(self._poller.poll(max(0, round((limit - time.monotonic()) * 1000))))
            if self.socket in events:
                return True
            if not events:
                return False
            self.events()

    def problem(self) -> str:
        """What is known of why no answer comes, empty if nothing."""
        if self.hung_up < SUSPICIOUS:
            return ""
        if self._identity is None:
            return "it ends every connection in the handshake; if it asks for keys, give --key and --server-key"
        server = self._identity.server(self._endpoint)
        return f"it ends every connection in the handshake, as a daemon does whose key is not {server} (--server-key)"

    def release(self) -> zmq.Socket[bytes]:
        """The socket, not watched any more."""
        if not self.monitor.closed:
            self.socket.disable_monitor()
            self.monitor.close(linger=0)
        return self.socket

    def check_owner(self) -> None:
        """Raise ConfigError when an ipc endpoint is another user's. Call it when it answers: it may be new."""
        if self._endpoint.startswith("ipc://"):
            check_socket(Path(self._endpoint.removeprefix("ipc://")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release().close()

    def events(self) -> list[int]:
        """What has become of the connection since the last look, of EVENTS. Raises RejectedError as `wait` does."""
        found: list[int] = []
        with contextlib.suppress(zmq.Again):
            while True:
                event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
                self.note(event["event"], event["value"])
                found.append(event["event"])
        return found

    def note(self, event: int, value: int) -> None:
        """Take note of what libzmq reported, of EVENTS. Raises RejectedError as `wait` does."""
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected, self.hung_up = True, 0
            case zmq.EVENT_CLOSED:
                self.hung_up = 0  # nobody listens there
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if value != errno.ETIMEDOUT:
                self.hung_up += 1
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                own = self._identity.own.public if self._identity else "PUBLIC"
                raise RejectedError(
                    f"the daemon at {self._endpoint} refused this key: expected one that it lets in, after `specd keys "
                    f"allow NAME {own}` on its host"
                )
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                if self._identity is None:
                    raise RejectedError(
                        f"the daemon at {self._endpoint} asks for keys: expected this trainer's and the daemon's own, "
                        f"with --key NAME and --server-key PUBLIC"
                    )
                raise RejectedError(
                    f"the daemon at {self._endpoint} uses no keys, and this trainer does not talk to it without: start "
                    f"it with --key NAME, or leave --key out here"
                )
