"""Rates of a daemon and its trainers between two looks at it, or over its life. Pure."""

from __future__ import annotations

from typing import NamedTuple

from specd.daemon.account import DOWN, FILLING, NO_REQUEST, NO_SLOT
from specd.protocol.messages import SessionStatus, StatusReport

FAULTS = {
    "failed": "failed batches",
    "refused_messages": "refused messages",
    "revoked_sessions": "revoked sessions",
    "expired": "expired leases",
    "worker_restarts": "deaths of the worker",
}
SHARES = {FILLING: "filling", NO_SLOT: "no slot", NO_REQUEST: "no request", DOWN: "down"}

BUSY = 0.95
"""A target that works more than this share of the time has no time left."""


class Pace(NamedTuple):
    """How fast something goes, each second."""

    batches: float
    tokens: float
    nbytes: float


class Rates(NamedTuple):
    """A daemon's rates. pace: of all it announced. trainers: by session. transports: bytes a second of each.

    shares: of the worker's time, as SHARES names it. forward: share of the time that the target's forwards took.
    faults: how many of each there ever were, and how many of them are new. counts: by how much each counter went up.
    """

    pace: Pace
    trainers: dict[str, Pace]
    transports: dict[str, float]
    shares: dict[str, float]
    forward: float
    faults: dict[str, tuple[int, int]]
    counts: dict[str, int]


def rates(now: StatusReport, before: StatusReport | None = None) -> Rates:
    """The rates from `before` to `now`; over the daemon's and the trainers' whole lives without it.

    A daemon that was started anew in between is measured since its start.
    """
    if before is not None and (before.pid != now.pid or before.uptime_s > now.uptime_s):
        before = None
    old = before.counters if before else {}
    counts = {name: count - old.get(name, 0) for name, count in now.counters.items()}
    seconds = max(1e-3, now.uptime_s - (before.uptime_s if before else 0.0))
    trainers, transports = {}, dict.fromkeys(now.transports, 0.0)
    earlier = {session.session: session for session in before.sessions} if before else {}
    for session in now.sessions:
        pace = trainers[session.session] = _pace(session, earlier.get(session.session))
        if session.transport:
            transports[session.transport] = transports.get(session.transport, 0.0) + pace.nbytes
    total = sum(counts.get(name, 0) for name in SHARES) or 1
    return Rates(
        pace=Pace(*(counts.get(name, 0) / seconds for name in ("batches", "tokens", "bytes"))),
        trainers=trainers,
        transports=transports,
        shares={word: counts.get(name, 0) / total for name, word in SHARES.items()},
        forward=counts.get("forward_us", 0) / 1e6 / seconds,
        faults={
            word: (now.counters.get(name, 0), counts.get(name, 0) if before else 0) for name, word in FAULTS.items()
        },
        counts=counts,
    )


def saved(counts: dict[str, int]) -> str:
    """What sharing saved, by the ring's counters; empty for nothing."""
    joins, reads = counts.get("joins", 0), counts.get("lag_hits", 0)
    if not joins + reads:
        return ""
    late = f", {reads:,} of them from the lag window" if reads else ""
    total = counts.get("fills", 0) + joins + reads
    return f"{joins + reads:,} of {total:,} requests needed no forward of their own{late}"


def who_waits(shares: dict[str, float]) -> str:
    """In words, who waits for whom."""
    word = max(shares, key=lambda each: shares[each])
    share = f"{shares[word]:.0%} of the time"
    busy = "trainers wait for the target" if shares[word] > BUSY else "the target keeps up"
    return {
        "filling": f"{busy}: it works {share}",
        "no slot": f"the target waits for a free slot {share}: trainers hold them all",
        "no request": f"the target waits for trainers {share}",
        "down": f"there is no worker {share}",
    }[word]


def _pace(now: SessionStatus, before: SessionStatus | None) -> Pace:
    if before is None or before.age_s >= now.age_s:
        seconds, old = max(1e-3, now.age_s), (0, 0, 0)
    else:
        seconds, old = now.age_s - before.age_s, (before.batches, before.tokens, before.nbytes)
    new = (now.batches, now.tokens, now.nbytes)
    return Pace(*((b - a) / seconds for a, b in zip(old, new, strict=True)))
