"""Watching daemons: their status, again and again, over connections that stay; who does not answer holds up nobody."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Sequence
from typing import NamedTuple, Self

import zmq

from specd import endpoints
from specd.client.line import Identity, Line
from specd.errors import ConfigError, ProtocolError, RejectedError
from specd.protocol import messages as wire

ABSENT = (zmq.EVENT_CLOSED, zmq.EVENT_CONNECT_RETRIED, zmq.EVENT_DISCONNECTED)
"""Last events of a line at whose end nobody is."""


class Reading(NamedTuple):
    """What one daemon said. report: None if it did not answer, and then why."""

    endpoint: str
    report: wire.StatusReport | None
    problem: str = ""


class Watch:
    """Lines to several daemons. A context manager. identity: as for a trainer. Raises ConfigError as `Line` does."""

    def __init__(self, where: Sequence[str], identity: Identity | None = None) -> None:
        self._endpoints = [endpoints.resolve_endpoint(each) for each in where]
        self._lines: dict[str, Line] = {}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            for endpoint in self._endpoints:
                self._lines[endpoint] = Line(self._context, endpoint, identity)
        except BaseException:
            self.close()
            raise

    def read(self, timeout_s: float) -> list[Reading]:
        """Ask all at once, and take what they answer within `timeout_s`; in the order of the endpoints.

        Where nobody listens, nothing is waited for.
        """
        found: dict[str, Reading] = {}
        poller = zmq.Poller()
        for line in self._lines.values():
            while line.socket.poll(0):  # an answer that came too late for the last time
                line.socket.recv()
            with contextlib.suppress(zmq.Again):
                line.socket.send(wire.encode(wire.Status()), zmq.NOBLOCK)
            poller.register(line.socket, zmq.POLLIN)
            poller.register(line.monitor, zmq.POLLIN)
        until = time.monotonic() + timeout_s
        while len(found) < len(self._lines) and (left := until - time.monotonic()) > 0:
            ready = dict(poller.poll(max(1, round(left * 1000))))
            for endpoint, line in self._lines.items():
                if endpoint not in found and (reading := _heard(endpoint, line, ready)) is not None:
                    found[endpoint] = reading
                    poller.unregister(line.socket)
                    poller.unregister(line.monitor)
        late = {endpoint: _silent(endpoint, line.problem()) for endpoint, line in self._lines.items()}
        return [found.get(endpoint, late[endpoint]) for endpoint in self._endpoints]

    def close(self) -> None:
        """Close all lines. Idempotent."""
        for line in self._lines.values():
            line.release().close()
        self._lines.clear()
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _heard(endpoint: str, line: Line, ready: Container[object]) -> Reading | None:
    """What came of one question, None while nothing did."""
    try:
        if line.socket in ready:
            line.check_owner()
            reply = wire.decode_reply(line.socket.recv())
            if isinstance(reply, wire.StatusReport):
                return Reading(endpoint, reply)
            return _silent(endpoint, f"it answered with {type(reply).__name__}")
        if line.monitor in ready and (events := line.events()) and events[-1] in ABSENT:
            return _silent(endpoint, line.problem())
    except (ProtocolError, ConfigError, RejectedError) as error:
        return _silent(endpoint, str(error))
    return None


def _silent(endpoint: str, problem: str) -> Reading:
    return Reading(endpoint, None, problem or "no daemon answers")
