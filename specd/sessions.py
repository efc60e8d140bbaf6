"""Sessions: which trainers are in, what they asked for, and whether their processes live."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import zmq

from specd import protocol as wire
from specd.admission import Request
from specd.config import host_id
from specd.ring import Ring


class Session:
    """One trainer. key: its routing id. requests: by seq. pidfd: readable once its process is dead; −1 if unknown."""

    __slots__ = ("batches", "credits", "key", "name", "nbytes", "opened", "pidfd", "requests", "spec", "transport")

    def __init__(self, key: bytes, hello: wire.Hello, credits: int, opened: float, pidfd: int) -> None:
        self.key = key
        self.name = hello.name
        self.spec = hello.spec
        self.credits = credits
        self.opened = opened
        self.pidfd = pidfd
        self.transport = ""
        self.requests: dict[int, Request] = {}
        self.batches = 0
        self.nbytes = 0

    def status(self, ring: Ring, now: float) -> wire.SessionStatus:
        """This session as STATUS shows it."""
        return wire.SessionStatus(
            session=self.key.hex(),
            name=self.name,
            transport=self.transport,
            credits=self.credits,
            outstanding=ring.outstanding(self.key),
            leases=len(ring.leases(self.key)),
            batches=self.batches,
            nbytes=self.nbytes,
            age_s=now - self.opened,
        )


class Sessions:
    """All open sessions by key, and a pidfd for each trainer that runs on this host."""

    def __init__(self, poller: zmq.Poller) -> None:
        self._poller = poller
        self._host = host_id()
        self._by_key: dict[bytes, Session] = {}
        self._by_pidfd: dict[int, bytes] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_key.values()))

    def __contains__(self, key: bytes) -> bool:
        return key in self._by_key

    def get(self, key: bytes) -> Session | None:
        """The session of a key, if it is open."""
        return self._by_key.get(key)

    def open(self, key: bytes, hello: wire.Hello, credits: int, now: float) -> Session:
        """Add a session, and watch its process if it is one of this host."""
        session = self._by_key[key] = Session(key, hello, credits, now, self._watch(hello))
        if session.pidfd >= 0:
            self._by_pidfd[session.pidfd] = key
            self._poller.register(session.pidfd, zmq.POLLIN)
        return session

    def pop(self, key: bytes) -> Session | None:
        """Remove a session, if it is open."""
        session = self._by_key.pop(key, None)
        if session is not None and session.pidfd >= 0:
            self._poller.unregister(session.pidfd)
            del self._by_pidfd[session.pidfd]
            os.close(session.pidfd)
        return session

    def dead(self, fds: Iterable[object]) -> list[bytes]:
        """Keys of the sessions whose process ended, given what can be read now."""
        return [key for fd, key in self._by_pidfd.items() if fd in fds]

    def _watch(self, hello: wire.Hello) -> int:
        """A pidfd of a trainer on this host, or −1. A false pid only ever ends the session that gave it."""
        if hello.host != self._host or hello.pid <= 0:
            return -1
        try:
            return os.pidfd_open(hello.pid)
        except OSError:
            return -1
