"""Sessions: the connected trainers, their requests, and whether their processes live."""

from __future__ import annotations

import hashlib
import logging
import os
import select
from collections.abc import Container, Iterator

import zmq

from specd import units
from specd.daemon.admission import Request
from specd.daemon.connections import Connection
from specd.daemon.ring import Ring
from specd.endpoints import host_id
from specd.protocol import messages as wire
from specd.protocol.batch import Layout

log = logging.getLogger(__name__)


class TrainerSession:
    """A trainer's session.

    key: routing id. connection: the one that it was opened over and belongs to, None within the process. label: names
    it without telling its key. name: for people, after whose key it is, if there are keys. run, ranks, share,
    epoch_batches: as in its HELLO. requests: by seq. pidfd: readable once its process ended, −1 if unknown.
    """

    __slots__ = (
        "batches", "connection", "credits", "epoch_batches", "gpus", "key", "label", "name", "nbytes", "opened",
        "pidfd", "ranks", "requests", "run", "share", "spec", "tokens", "transport",
    )  # fmt: skip

    def __init__(
        self, key: bytes, connection: Connection | None, hello: wire.Hello, credits: int, opened: float, pidfd: int
    ) -> None:
        self.key = key
        self.connection = connection
        self.label = hashlib.blake2b(key, digest_size=8).hexdigest()
        owner = f"{connection.name}/" if connection is not None and connection.name else ""
        self.name = owner + units.printable(hello.name)
        self.gpus = hello.gpus
        self.run = hello.run
        self.ranks = hello.ranks
        self.share = hello.share
        self.epoch_batches = hello.epoch_batches
        self.spec = hello.spec
        self.credits = credits
        self.opened = opened
        self.pidfd = pidfd
        self.transport = ""
        self.requests: dict[int, Request] = {}
        self.batches = self.tokens = self.nbytes = 0

    def __str__(self) -> str:
        return f"{self.label[:8]} of {self.name}"

    def cuts(self, cutting: Container[str]) -> bool:
        """Whether it can take its states out of a slot that holds more. cutting: transports that can."""
        return self.transport in cutting

    def served(self, layout: Layout) -> None:
        """Count a batch that was announced to it."""
        self.batches += 1
        self.tokens += layout.tensors[0].shape[0]
        self.nbytes += layout.nbytes

    def status(self, ring: Ring, now: float) -> wire.SessionStatus:
        """This session as STATUS shows it."""
        return wire.SessionStatus(
            session=self.label,
            name=self.name,
            transport=self.transport,
            gpus=self.gpus,
            credits=self.credits,
            outstanding=ring.outstanding(self.key),
            leases=len(ring.leases(self.key)),
            batches=self.batches,
            tokens=self.tokens,
            nbytes=self.nbytes,
            age_s=now - self.opened,
            run=hashlib.blake2b(self.run, digest_size=4).hexdigest() if self.run else "",
            ranks=self.ranks,
            share=units.printable(self.share),
            behind=ring.behind(self.key),
        )


class Sessions:
    """All open sessions by key, and a pidfd for each local process that has one or may still read the ring.

    The ring knows a process by its pidfd, which stays open, and so unique, while slots are quarantined for it.
    """

    def __init__(self, poller: zmq.Poller, ring: Ring) -> None:
        self._poller = poller
        self._ring = ring
        self._host = host_id()
        self._by_key: dict[bytes, TrainerSession] = {}
        self._pids: dict[int, int] = {}  # pidfd → pid
        self._keys: dict[int, set[bytes]] = {}  # pidfd → its process's sessions

    def __iter__(self) -> Iterator[TrainerSession]:
        return iter(list(self._by_key.values()))

    def __contains__(self, key: bytes) -> bool:
        return key in self._by_key

    def lookups(self, unknown: int) -> int:
        """How many batches all runs here ask for in two epochs, the longest until one comes again.

        unknown: at least so many where a run did not say how long its epoch is.
        """
        runs = {each.run or each.key: each.epoch_batches for each in self}
        return max(2 * sum(runs.values()), 0 if all(runs.values()) else unknown)

    def get(self, key: bytes) -> TrainerSession | None:
        """The session of a key, if it is open."""
        return self._by_key.get(key)

    def connections(self) -> set[Connection]:
        """Those that have a session."""
        return {each.connection for each in self if each.connection is not None}

    def over(self, connection: Connection) -> list[bytes]:
        """Keys of the sessions of a connection."""
        return [session.key for session in self if session.connection is connection]

    def open(self, key: bytes, hello: wire.Hello, connection: Connection | None, now: float) -> TrainerSession | str:
        """Open a session, or return why there is no room; watches the trainer's process if it is local.

        The first rank of a run that comes keeps places for all of them, so that two runs never wait for each other's.
        """
        if problem := self._kept(hello):
            return problem
        pidfd = self._watch(hello, connection.pid if connection is not None else 0)
        credits = self._ring.open(key, hello.credits, pidfd, spec=hello.spec, share=hello.share, run=hello.run)
        if credits is None:
            self._unwatch(pidfd)
            return self._why_full()
        if pidfd >= 0:
            self._keys[pidfd].add(key)
        session = self._by_key[key] = TrainerSession(key, connection, hello, credits, now, pidfd)
        log.info("session %s: %d credits", session, credits)
        return session

    def pop(self, key: bytes) -> TrainerSession | None:
        """Remove a session, if it is open, and free all it holds; what its process may still read is quarantined."""
        session = self._by_key.pop(key, None)
        self._ring.close(key)
        if session is not None and session.pidfd >= 0:
            self._keys[session.pidfd].remove(key)
            self._unwatch(session.pidfd)
            slots = self._ring.quarantined(session.pidfd)
            if slots and not _is_dead(session.pidfd):
                pid = self._pids[session.pidfd]
                log.warning("process %d of %s keeps %d borrowed slots until it ends", pid, session.name, slots)
        return session

    def dead(self, fds: Container[object]) -> list[bytes]:
        """Keys of the sessions whose process ended. fds: the readable ones. Pop them, then `release_dead`."""
        return [key for pidfd, keys in self._keys.items() if pidfd in fds for key in keys]

    def release_dead(self, fds: Container[object]) -> None:
        """End the quarantine of slots borrowed by processes that ended."""
        for pidfd in [pidfd for pidfd in self._keys if pidfd in fds]:
            self._ring.dead(pidfd)
            self._unwatch(pidfd)

    def reset(self) -> None:
        """Drop all leases and quarantines: the worker is gone, and the ring's memory with it."""
        self._ring.reset()
        for pidfd in list(self._keys):
            self._unwatch(pidfd)

    def _watch(self, hello: wire.Hello, peer: int) -> int:
        """A pidfd of a local trainer; −1 if its pid is unknown, or not `peer`, which the kernel named (0: none)."""
        if hello.host != self._host or hello.pid <= 0 or peer not in (0, hello.pid):
            return -1
        for pidfd, pid in self._pids.items():
            if pid == hello.pid and not _is_dead(pidfd):
                return pidfd
        try:
            pidfd = os.pidfd_open(hello.pid)
        except OSError:
            return -1
        self._pids[pidfd], self._keys[pidfd] = hello.pid, set()
        self._poller.register(pidfd, zmq.POLLIN)
        return pidfd

    def _unwatch(self, pidfd: int) -> None:
        """Close a pidfd once its process has no session and no quarantined slot."""
        if pidfd >= 0 and not self._keys[pidfd] and not self._ring.quarantined(pidfd):
            del self._keys[pidfd], self._pids[pidfd]
            self._poller.unregister(pidfd)
            os.close(pidfd)

    def _kept(self, hello: wire.Hello) -> str | None:
        """Why the places of other runs leave none for all ranks of this one, or None."""
        places, others = self._ring.max_holders, 0
        ranks, own = hello.ranks, 1
        runs: dict[bytes, list[TrainerSession]] = {}
        for session in self:
            runs.setdefault(session.run, []).append(session)
        for run, sessions in runs.items():
            most = max(session.ranks for session in sessions) if run else 0
            if run and run == hello.run:
                ranks, own = max(ranks, most), 1 + len(sessions)
            else:
                others += max(most, len(sessions))
        if others + max(ranks, own) <= places:
            return None
        if len(self._by_key) >= places:
            return self._why_full()
        return (
            f"{others} of {places} sessions (ring.max_sessions of the daemon) are taken by other trainers or kept for "
            f"their ranks, and this run needs {max(ranks, own)}: there is room once those end"
        )

    def _why_full(self) -> str:
        if len(self._by_key) >= self._ring.max_holders:
            return f"all {self._ring.max_holders} sessions are taken (ring.max_sessions of the daemon)"
        pids = sorted({pid for pidfd, pid in self._pids.items() if self._ring.quarantined(pidfd)})
        return (
            f"{self._ring.counts()['quarantined']} of {self._ring.num_slots} slots are quarantined: their sessions are "
            f"over, but processes {', '.join(map(str, pids))} may still read them in place; there is room once such a "
            f"process ends, or with a larger ring.slots"
        )


def _is_dead(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
