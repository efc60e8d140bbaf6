"""The gate: which keys a daemon lets in over TCP, and how many sessions each may have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

import zmq

from specd.config.settings import DaemonAuth
from specd.curve import keys, zap
from specd.curve.authorized import Authorized, authorized_path
from specd.daemon.connections import Connection

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""How often the file of those that are let in is looked at."""


class Gate:
    """Answers, in the control loop, who may connect to the sockets it guards. To be there before they are bound.

    socket: to be polled; `answer` when it is readable. Raises ConfigError for keys that cannot be used.
    """

    def __init__(self, auth: DaemonAuth, context: zmq.Context[zmq.Socket[bytes]], clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pair = keys.load(auth.key)
        self._authorized = Authorized(authorized_path(auth.authorized))
        self._zap = zap.Zap(context, self._asked)
        self._look_at = clock() + LOOK_S
        self._changed = False
        self.socket = self._zap.socket
        log.info("this daemon's public key is %s; %d keys are let in", self._pair.public, len(self._authorized))

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """Have `socket` ask for keys at the endpoints that it is bound to from now on."""
        zap.guard(socket, self._pair)

    def answer(self) -> None:
        """Let connections in, or not."""
        self._zap.handle()

    def lets_in(self, public: str) -> bool:
        """Whether a key is let in, by the file as it was last read."""
        return public in self._authorized

    def quota(self, max_sessions: int) -> int:
        """How many of `max_sessions` a key may have: all; where several keys are let in, all but one."""
        return max_sessions if len(self._authorized) < 2 else max(1, max_sessions - 1)

    def over_quota(self, connection: Connection, taken: Collection[Connection], max_sessions: int) -> str | None:
        """Why a key may not have one more of `max_sessions`, or None. taken: connections that have one."""
        quota = self.quota(max_sessions)
        if (own := sum(each.user == connection.user for each in taken)) < quota:
            return None
        return f"{own} sessions are {connection.name}'s already, and a key may have {quota}"

    def changed(self) -> bool:
        """Whether others are let in since the last call; looks at the file once in LOOK_S."""
        if self._clock() >= self._look_at:
            self._refresh()
        changed, self._changed = self._changed, False
        return changed

    def next_deadline(self) -> float:
        """When `changed` looks again."""
        return self._look_at

    def name(self, user: str) -> str:
        """Whose key that is, empty for a stranger's."""
        return self._authorized.name(user)

    def close(self) -> None:
        """From now on nobody is let in."""
        self._zap.close()

    def _asked(self, public: str) -> bool:
        self._refresh()  # so that a key counts as soon as it is in the file
        name = self._authorized.name(public)
        if not name:
            log.info("a key that is not let in was refused: %s", public)
        return bool(name)

    def _refresh(self) -> None:
        self._look_at = self._clock() + LOOK_S
        self._changed |= self._authorized.refresh()
