"""Questions to a daemon that need no session."""

from __future__ import annotations

import contextlib

import zmq

from specd import endpoints
from specd.client.line import Context, Identity, Line
from specd.errors import ConfigError, DaemonError, ProtocolError
from specd.protocol import messages as wire

LONGEST_S = 86_400.0
"""Longest wait that a person may ask for."""


def dial(context: Context, endpoint: str, identity: Identity | None = None) -> zmq.Socket[bytes]:
    """A socket to a daemon, not watched. Raises ConfigError as `Line` does."""
    return Line(context, endpoint, identity).release()


def waitable(timeout_s: float) -> float:
    """`timeout_s` itself. Raises ConfigError for what no poll can wait: less than nothing, nan, more than LONGEST_S."""
    if not 0 <= timeout_s <= LONGEST_S:
        raise ConfigError(f"a timeout of {timeout_s:g} s: expected a number of seconds, 0 to {LONGEST_S:,.0f}")
    return timeout_s


def ask_status(endpoint: str, timeout_s: float, identity: Identity | None = None) -> wire.StatusReport:
    """Ask a daemon what it is doing.

    Raises DaemonError when none answers, RejectedError when it refuses this key, ConfigError as `waitable` does.
    """
    waitable(timeout_s)
    with zmq.Context() as context, Line(context, endpoint, identity) as line:
        with contextlib.suppress(zmq.Again):  # it hung up for good; nothing will come
            line.socket.send(wire.encode(wire.Status()), zmq.NOBLOCK)
        if not line.wait(timeout_s):
            remedy = line.problem() or "start one with `specd start --model MODEL`, or name its --endpoint"
            raise DaemonError(
                f"no daemon answers at {endpoints.resolve_endpoint(endpoint)} within {timeout_s:g} s: {remedy}"
            )
        line.check_owner()
        reply = wire.decode_reply(line.socket.recv())
        if not isinstance(reply, wire.StatusReport):
            raise ProtocolError(f"the daemon answered with {type(reply).__name__}, expected StatusReport")
        return reply
