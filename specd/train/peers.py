"""What the ranks of a run know of each other: who lives, and why the run ends; one rank's end is everybody's.

Facts travel through the launcher's key-value store, never through a collective: a rank that waits for a lost peer in an
all-reduce still learns of it here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec

from specd.errors import ConfigError, PeerError, RejectedError, first_line

logger = logging.getLogger(__name__)

BEAT_S: Final = 0.25
MANY_RANKS: Final = 64
"""From so many on a rank beats every second: all beats go to one process."""
ABORT: Final = "abort"
HEARD: Final = "heard"
"""Set by rank 0, which will say why the run ends."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One rank. host_id: equal where its process can be watched. restarts: of its launcher, as far as it knows.

    nonce: of this process alone.
    """

    rank: int
    host: str
    host_id: str
    pid: int
    restarts: int = 0
    nonce: str = ""


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """Why a run ends. rank, host: of whom it is about. code: its exit code. teller: the rank that says so."""

    rank: int
    host: str
    kind: Literal["error", "interrupt", "lost"]
    reason: str
    code: int = 1
    teller: int

    def error(self, rank: int) -> PeerError:
        """As the error of rank `rank`, for everyone but the rank that it is about."""
        said = rank != 0 and not (rank == self.teller and self.kind == "lost" and self.rank == 0)
        return PeerError(
            f"rank {self.rank} on {self.host}: {self.reason}",
            code=self.code,
            said=said,
            interrupted=self.kind == "interrupt",
        )


class Watch:
    """A thread that shows the others that this rank lives, and sees when one of them does not, or says why it ends.

    store: a connection of the thread's own. patience_s: how long a rank may show no life; on this host the kernel says
    at once when its process is dead. at_end: called once, on that thread, when the run ends for a peer.
    """

    def __init__(self, store: Any, me: Member, members: list[Member], patience_s: float) -> None:
        self._store, self._me, self.patience_s = store, me, patience_s
        self._others = {member.rank: member for member in members if member.rank != me.rank}
        self._every_s = BEAT_S if len(members) < MANY_RANKS else 1.0
        self._pidfds: dict[int, int] = {}
        self._wake, self._stop = os.pipe()
        self._stopping = False
        self._ended = threading.Event()
        self._ending: Ending | None = None
        self._at_end: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="specd-peers", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        for rank, member in self._others.items():
            if member.host_id and member.host_id == self._me.host_id:
                with contextlib.suppress(OSError):  # it is dead already, and shows no life
                    self._pidfds[os.pidfd_open(member.pid)] = rank
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stopping = True
        os.write(self._stop, b"x")
        self._thread.join(5)
        for fd in (self._wake, self._stop, *self._pidfds):
            os.close(fd)

    def at_end(self, call: Callable[[], None]) -> None:
        """Have `call` called when the run ends for a peer."""
        self._at_end.append(call)

    def wait(self, timeout_s: float) -> bool:
        """Wait until the run ends for a peer; whether it does."""
        return self._ended.wait(timeout_s)

    def error(self) -> PeerError | None:
        """Why the run ends, None while it does not."""
        return self._ending.error(self._me.rank) if self._ended.is_set() and self._ending else None

    def _run(self) -> None:
        beats: dict[int, tuple[bytes, float]] = dict.fromkeys(self._others, (b"", time.monotonic()))
        poll, count, due = select.poll(), 0, 0.0
        for fd in (self._wake, *self._pidfds):
            poll.register(fd, select.POLLIN)
        while not self._stopping:
            dead = [fd for fd, _ in poll.poll(max(0.0, due - time.monotonic()) * 1e3) if fd != self._wake]
            for fd in dead:
                poll.unregister(fd)
            if self._stopping:
                return
            try:
                count, due = count + 1, time.monotonic() + self._every_s
                self._store.set(f"beat/{self._me.rank}", str(count))
                ending = self._look(beats, [self._pidfds[fd] for fd in dead])
            except RuntimeError as error:
                if self._stopping:
                    return
                gone = f"its launcher no longer answers ({first_line(error)})"
                ending = self._lost(self._me, gone)
            if ending is not None:
                self._end(ending)
                if self._me.rank == 0:
                    with contextlib.suppress(RuntimeError):
                        self._store.set(HEARD, "")
                return

    def _look(self, beats: dict[int, tuple[bytes, float]], dead: list[int]) -> Ending | None:
        """What ends the run, if anything does. beats: the last beat of each peer that counts, and when it came."""
        if self._store.check([ABORT]):
            return msgspec.json.decode(self._store.get(ABORT), type=Ending)
        ranks, now = list(beats), time.monotonic()
        found = self._store.multi_get([f"beat/{rank}" for rank in ranks]) if ranks else []
        lost: dict[int, str] = {}
        for rank, beat in zip(ranks, found, strict=True):
            if beat == b"done":
                del beats[rank]
            elif rank in dead:
                lost[rank] = "its process is dead"
            elif beat != beats[rank][0]:
                beats[rank] = beat, now
            elif now - beats[rank][1] > self.patience_s:
                lost[rank] = f"no sign of life for {self.patience_s:g} s (train.peer_patience_s)"
        if not lost:
            return None
        rank, why = min(lost.items())
        return tell(self._store, self._lost(self._others[rank], why))

    def _lost(self, member: Member, why: str) -> Ending:
        return Ending(rank=member.rank, host=member.host, kind="lost", reason=why, teller=self._me.rank)

    def _end(self, ending: Ending) -> None:
        self._ending = ending
        self._ended.set()
        for call in self._at_end:
            try:
                call()
            except RuntimeError as error:
                logger.debug("while the run ends: %s", error)


def exit_code(error: BaseException) -> int:
    """What a rank ends with: 2 where it was started wrongly, for its daemon, too."""
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ConfigError | RejectedError) else 1


def tell(store: Any, ending: Ending) -> Ending:
    """Say why the run ends, unless somebody has; the reason that stands."""
    stands: bytes = store.compare_set(ABORT, "", msgspec.json.encode(ending).decode())
    return msgspec.json.decode(stands, type=Ending)
