"""The front: the socket that trainers talk to, what it lets in, and how much it keeps for those that do not read."""

from __future__ import annotations

import resource
from collections.abc import Callable, Collection, Iterator

import zmq

from specd.config.settings import DaemonConfig
from specd.curve.zap import OVERHEAD_BYTES, user_of
from specd.daemon.connections import IDLE_S, Connection, Connections
from specd.daemon.gate import Gate
from specd.errors import ConfigError, DaemonError
from specd.protocol import limits
from specd.protocol import messages as wire
from specd.protocol.capture import DTYPE_BYTES
from specd.protocol.messages import Message

LISTEN_S = 0.01
"""Messages are taken for up to this long at a time, so that a flood does not delay the worker's."""
OWN_FILES = 64
"""Descriptors that the daemon needs beside its connections and sessions."""
UNREAD = 16
"""Messages to one peer, beside one for each slot, that it may leave unread."""
FEW_CONNECTIONS = 64
"""Fewest connections without a session that there must be room for."""


class Front:
    """A ROUTER on all endpoints of a daemon. Not thread-safe: the control loop owns it.

    endpoints: as they are bound, ports included. gate: who comes in over TCP, None if it asks for no keys. Raises
    DaemonError where it cannot listen, ConfigError for keys that cannot be used.
    """

    def __init__(
        self,
        settings: DaemonConfig,
        endpoints: tuple[str, ...],
        context: zmq.Context[zmq.Socket[bytes]],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._most_idle = max(FEW_CONNECTIONS, _file_limit() // 2 - _needed(settings.ring.max_sessions))
        keyed = settings.auth if any(endpoint.startswith("tcp://") for endpoint in endpoints) else None
        self.gate = Gate(keyed, context, clock) if keyed else None
        self._socket = context.socket(zmq.ROUTER)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        # What one connection may keep here, sent to it and not read, and said by it and not heard. All batches of a
        # trainer may be announced at once, and libzmq says that messages left only once half of the mark have.
        self._socket.set(zmq.SNDHWM, 2 * (UNREAD + settings.ring.slots))
        self._socket.set(zmq.RCVHWM, 16)
        self._socket.set(zmq.MAXMSGSIZE, largest_request(settings) + (OVERHEAD_BYTES if self.gate else 0))
        self._socket.set(zmq.LINGER, 500)  # before bind, as the supervisor's pipes
        self._socket.set(zmq.HANDSHAKE_IVL, 5000)
        self._socket.set(zmq.HEARTBEAT_IVL, 5000)
        self._socket.set(zmq.HEARTBEAT_TIMEOUT, 20000)
        self._connections = Connections(self._socket, clock)
        self._lost: list[Connection] = []
        self._inside = all(endpoint.startswith("inproc://") for endpoint in endpoints)
        self._tidy_at = clock() + IDLE_S
        self.endpoints = tuple(self._bind(endpoint) for endpoint in endpoints)

    def _bind(self, endpoint: str) -> str:
        self._socket.set(zmq.IPV6, int(endpoint.startswith("tcp://[")))
        if self.gate is not None and endpoint.startswith("tcp://"):
            self.gate.guard(self._socket)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close(linger_ms=0)
            raise DaemonError(f"cannot listen on {endpoint}: {error.strerror or error}") from None
        return self._socket.get_string(zmq.LAST_ENDPOINT)

    def __len__(self) -> int:
        """How many connections there are."""
        return len(self._connections)

    def register(self, poller: zmq.Poller) -> None:
        """Have a poller wake for messages, and for connections that come and go."""
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._connections.monitor, zmq.POLLIN)
        if self.gate is not None:
            poller.register(self.gate.socket, zmq.POLLIN)

    def lost(self) -> list[Connection]:
        """Connections that ended, and whose every message was taken, since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def refused(self) -> list[Connection]:
        """Close the connections whose key is not let in any more, and return them; lets others in, too."""
        if self.gate is None:
            return []
        self.gate.answer()
        if not self.gate.changed():
            return []
        # Of one that has said nothing yet the key is not known: `messages` looks at it.
        refused = [each for each in self._connections if each.user and not self.gate.lets_in(each.user)]
        for connection in refused:
            connection.close()
        return refused

    def stranger(self, connection: Connection | None) -> str | None:
        """Why whoever is at the other end gets no session, or None. With keys, nobody else is heard at all."""
        if connection is None or self.gate is not None or self._settings.insecure:
            return None
        return connection.stranger()

    def too_many(self, connection: Connection | None, ranks: int) -> str | None:
        """Why a run of so many ranks never fits, or None."""
        places = self._settings.ring.max_sessions
        most = places if connection is None or self.gate is None else self.gate.quota(places)
        if ranks <= most:
            return None
        quota = "" if most == places else f", of which a key may have {most}"
        return (
            f"this daemon takes {places} session{'s' * (places > 1)} (ring.max_sessions){quota}, and this run has "
            f"{ranks} ranks here: start it with `specd start … --trainers {ranks + places - most}`"
        )

    def over_quota(self, connection: Connection | None, taken: Collection[Connection]) -> str | None:
        """Why a key may not have one more session, or None. taken: connections that have one."""
        if connection is None or self.gate is None:
            return None
        return self.gate.over_quota(connection, taken, self._settings.ring.max_sessions)

    def messages(self) -> Iterator[tuple[bytes, Connection | None, list[zmq.Frame]]]:
        """What came in: routing id, connection (None over inproc) and frames, for up to LISTEN_S."""
        end, ended = self._clock() + LISTEN_S, self._connections.ended()
        while self._clock() < end:
            try:
                sender, *frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                self._lost += self._connections.forget(ended)
                return
            connection = self._connections.of(sender)
            if connection is None and not self._inside:
                continue  # it was closed, and whoever it was must not be taken for this process
            if self.gate is not None and connection is not None:
                connection.user = user_of(sender)
                connection.name = self.gate.name(connection.user)
                if not self.gate.lets_in(connection.user):
                    connection.close()
                    continue
            yield sender.bytes, connection, frames

    def send(self, key: bytes, message: Message) -> str:
        """Send to one peer, never blocking; returns why it cannot be reached, empty if it was sent."""
        frames = [key, wire.encode(message)]
        try:
            try:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
            except zmq.Again:
                # libzmq may not have looked yet at what was read meanwhile; asked for its events, it does.
                self._socket.get(zmq.EVENTS)
                self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return "it does not read its messages"
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return "its connection is gone"
        return ""

    def next_deadline(self) -> float:
        """When `tidy` or `refused` is due."""
        return self._tidy_at if self.gate is None else min(self._tidy_at, self.gate.next_deadline())

    def tidy(self, busy: Collection[Connection]) -> int:
        """Close connections that have no session and say nothing, if it is time to; returns how many.

        busy: those that have one.
        """
        now = self._clock()
        if now < self._tidy_at and len(self) - len(busy) <= self._most_idle:
            return 0
        self._tidy_at = now + IDLE_S / 4
        return self._connections.close_idle(busy, self._most_idle)

    def close(self, linger_ms: int | None = None) -> None:
        """Close the socket, and all connections. linger_ms: how long what was sent may still leave, None for long."""
        self._connections.close()
        self._socket.close(linger=linger_ms)
        if self.gate is not None:
            self.gate.close()


def largest_request(settings: DaemonConfig) -> int:
    """Bytes of the largest frame that a daemon takes: a SUBMIT of as many tokens as fit a slot, all sequences short,
    with as many bytes of payloads as it takes.

    A trainer that captures less than the slots are sized for fits more tokens than `ring.slot_tokens`.
    """
    capture = settings.capture
    widths = DTYPE_BYTES.get(capture.dtype, 4)  # as float8 has it, a state takes a byte
    tokens = settings.ring.slot_tokens * max(1, sum(capture.sized_for)) * widths
    payloads = settings.ring.payload_mib << 20
    a_token = 8 + (5 if payloads else 0)  # its id, a length, and how long a payload is
    return min(limits.MAX_MESSAGE_BYTES, a_token * tokens + limits.MAX_REQUEST_BYTES) + payloads


def raise_file_limit(max_sessions: int) -> None:
    """Raise this process's limit of open files as far as it may; call it once, before a daemon starts.

    Raises ConfigError when that is too few for `max_sessions`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    need = _needed(max_sessions) + FEW_CONNECTIONS
    if (limit := _file_limit()) < need:
        raise ConfigError(
            f"ring.max_sessions={max_sessions} needs {need} open files, and this process may have {limit}: raise the "
            f"hard limit (ulimit -Hn), or take fewer sessions"
        )


def _needed(max_sessions: int) -> int:
    """Descriptors of a daemon: two a session, for its connection and its process."""
    return 2 * max_sessions + OWN_FILES


def _file_limit() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit
