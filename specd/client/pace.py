"""Pace: what one daemon was asked for, how fast it answers, when the next answer is due, and when it is late.

A daemon answers one request after the other, so the time of one is that since the answer before it or, if it came later
than that, since it was asked for: queueing is no part of it, round trips are. The wire moves one batch while the next
is captured, so what a batch costs is the longer of both. Daemons that merge batches into one forward announce them
together; then the share of the forward that each took is the better measure, so the longest of three is what counts.

What a daemon had kept it reads on a lane of its own, beside its forwards and mostly in less time: such answers are
measured apart. A batch that it may have kept *costs* the tokens of a forward that would take as long, by how many of
the last ones were kept.

Times are seconds a token over the most recent batches without the slowest, which a pause or a compilation explains. A
daemon is *known* after two answers: its first forward may have compiled. Answers of long ago count for nothing once it
is measured again, which is `due` when it has been idle for some time. No thread, no clock: the times are given.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

RECENT = 8
"""Answers that count."""
CHANCE = 32
"""Batches that a daemon may have kept by which it is told how many it has."""
KNOWN = 2
"""Answers after which the pace is known."""
LATE = 5.0
"""A request is late after so many times its usual time, but not before LATE_S."""
LATE_S = 2.0
IDLE = 20.0
"""An idle daemon is measured again after so many times what a batch takes, within IDLE_S: it costs it up to 5 %."""
IDLE_S = (1.0, 60.0)


class _Rate:
    """Seconds a token over the most recent batches, without the slowest."""

    __slots__ = ("_recent",)

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT)

    def add(self, seconds: float, tokens: int) -> None:
        self._recent.append((seconds, tokens))

    def clear(self) -> None:
        self._recent.clear()

    @property
    def known(self) -> bool:
        return bool(self._recent)

    @property
    def per_token(self) -> float:
        ordered = sorted(self._recent, key=lambda one: one[0] / one[1])
        counted = ordered[:-1] or ordered
        return sum(seconds for seconds, _ in counted) / max(1, sum(tokens for _, tokens in counted))


class _Request(NamedTuple):
    """cost: in tokens of a forward. kept: whether the daemon may have kept it."""

    asked: float
    tokens: int
    cost: float
    kept: bool


class Pace:
    """The pace of one session. Times are in the seconds of one monotonic clock; `seq` is the number of a request."""

    __slots__ = (
        "_answered", "_answers", "_asked", "_capture", "_due", "_hits", "_read", "_replay", "_share", "_unfetched",
        "_wire",
    )  # fmt: skip

    def __init__(self) -> None:
        self._asked: dict[int, _Request] = {}
        """Requests that are not answered yet, oldest first."""
        self._unfetched: dict[int, _Request] = {}
        """Those of batches that are announced, and not fetched yet."""
        self._answered = self._read = float("-inf")
        """When a forward was announced last, or anything refused, and when what had been kept."""
        self._answers = 0
        self._due = float("-inf")
        self._capture, self._share, self._wire, self._replay = _Rate(), _Rate(), _Rate(), _Rate()
        self._hits: deque[bool] = deque(maxlen=CHANCE)

    def ask(self, seq: int, tokens: int, now: float, *, kept: bool = False) -> None:
        """A batch was asked for. kept: whether the daemon may have it."""
        self._asked[seq] = _Request(now, tokens, self.cost(tokens, kept=kept), kept)

    def asks(self, seq: int) -> bool:
        """Whether the daemon owes an answer to this request."""
        return seq in self._asked

    def answer(self, seq: int, share_s: float, now: float, *, replayed: bool = False) -> None:
        """A batch was announced. share_s: of the target's forward. replayed: there was none, it had been kept."""
        request = self._asked.pop(seq)
        asked, tokens, _, kept = request
        if asked > max(self._due, self._answered, self._read):  # it was idle, and may be another since
            for rate in (self._replay, self._wire) if replayed else (self._capture, self._share, self._wire):
                rate.clear()
        if replayed:
            self._replay.add(now - max(asked, self._read), tokens)
            self._read = now
        else:
            self._capture.add(now - max(asked, self._answered), tokens)
            self._share.add(share_s, tokens)
            self._answered = now
        if kept:
            self._hits.append(replayed)
        self._unfetched[seq] = request
        self._answers += 1
        least, most = IDLE_S
        self._due = now + min(max(least, IDLE * self._usual * tokens), most) if self.known else now

    def fetch(self, seq: int, took_s: float) -> None:
        """A batch that was announced is here, after a transfer of `took_s` seconds."""
        if seq in self._unfetched:
            self._wire.add(took_s, self._unfetched.pop(seq).tokens)

    def forget(self, seq: int, now: float) -> None:
        """Nothing more comes of a request, or it is of no interest. Unknown ones are ignored."""
        self._unfetched.pop(seq, None)
        if self._asked.pop(seq, None) is not None:
            self._answered = now
            self._due = now + IDLE_S[0]

    @property
    def known(self) -> bool:
        """Whether it has answered often enough to be relied on."""
        return self._answers >= KNOWN

    @property
    def per_token(self) -> float:
        """What a token of a forward costs, in seconds; 1 if it is not known."""
        if not (self.known and self._capture.known):
            return 1.0
        return max(self._capture.per_token, self._share.per_token, self._wire.per_token)

    @property
    def _usual(self) -> float:
        """What a token takes of what it mostly does, in seconds."""
        return self.per_token if self._capture.known else max(self._replay.per_token, self._wire.per_token)

    def cost(self, tokens: int, *, kept: bool) -> float:
        """Tokens of a forward that takes as long as a batch of `tokens` does. kept: it may have been kept."""
        if not (kept and self._replay.known and self._hits):
            return tokens
        hits = sum(self._hits) / len(self._hits) if self._capture.known else 1.0
        read, forward = max(self._replay.per_token, self._wire.per_token), self.per_token
        return tokens * (1 - hits + hits * (read / forward if read < forward else 1.0))

    @property
    def owed(self) -> int:
        """How many answers it owes."""
        return len(self._asked)

    @property
    def waiting(self) -> float:
        """What all batches cost that were asked for and are not here."""
        return sum(request.cost for batches in (self._asked, self._unfetched) for request in batches.values())

    def finish(self, cost: float, now: float) -> float:
        """Seconds until a batch that costs so much would be here that is asked for behind all that was."""
        done = min(self.silence(now), self.per_token * self._next.cost) if self.known and self._asked else 0.0
        return (self.waiting + cost) * self.per_token - done

    def silence(self, now: float) -> float:
        """How long the daemon has owed its next answer, in seconds; 0 if it owes none."""
        if not self._asked:
            return 0.0
        return now - max(self._next.asked, self._answered, self._read)

    def late(self, now: float) -> bool:
        """Whether its next answer is late: then it may be hung, and it is asked for nothing that another could do."""
        usual = self._usual * self._next.tokens if self.known and self._asked else 0.0
        return self.silence(now) > max(LATE_S, LATE * usual)

    @property
    def _next(self) -> _Request:
        """What it answers next."""
        return next(iter(self._asked.values()))

    def stalls(self, took_s: float, tokens: int) -> bool:
        """Whether a transfer that goes on for `took_s` seconds is late. Never before one was made: nothing is usual."""
        usual = self._wire.per_token * tokens
        return self.known and usual > 0 and took_s > max(LATE_S, LATE * usual)

    def due(self, now: float) -> bool:
        """Whether it should be measured: it owes nothing, and is not known or was idle for some time."""
        return not self._asked and not self._unfetched and now >= self._due
