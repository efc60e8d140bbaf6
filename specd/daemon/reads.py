"""Reads of artifacts: a few in the worker at a time, in turn, and none for a session that is over. Pure."""

from __future__ import annotations

from collections import Counter, deque

from specd.worker.messages import ReadArtifact

IN_WORKER = 4
"""Reads that the worker has at a time: its other work waits for these at most."""


class Reads:
    """What sessions asked to read and were not answered."""

    def __init__(self) -> None:
        self._waiting: deque[ReadArtifact] = deque()
        self._running: Counter[bytes] = Counter()

    def __len__(self) -> int:
        return len(self._waiting) + self._running.total()

    def of(self, session: bytes) -> int:
        """How many reads of a session are not answered."""
        return self._running[session] + sum(read.session == session for read in self._waiting)

    def add(self, read: ReadArtifact) -> None:
        """Have bytes read, in its turn."""
        self._waiting.append(read)

    def next(self) -> list[ReadArtifact]:
        """The reads that the worker is sent now."""
        sent: list[ReadArtifact] = []
        while self._waiting and self._running.total() < IN_WORKER:
            read = self._waiting.popleft()
            self._running[read.session] += 1
            sent.append(read)
        return sent

    def done(self, session: bytes) -> None:
        """The worker answered a read."""
        self._running -= Counter([session])  # and forget those at 0

    def drop(self, session: bytes) -> None:
        """A session is over: what it waits for is not read."""
        self._waiting = deque(read for read in self._waiting if read.session != session)

    def died(self) -> None:
        """The worker is dead."""
        self._waiting.clear()
        self._running.clear()
