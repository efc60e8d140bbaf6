"""Peers: what the window knows of each daemon, and which of them gets a batch. Pure: no thread, no clock.

A batch goes to the daemon that would bring it first: everything that it owes and this one, at its measured pace. That
is earliest finish time, over an estimate that corrects itself: a slow daemon gets a batch only if it brings it before
the others would have come to it, so that nothing waits behind it. Daemons whose pace is not known are asked only while
no other is, evenly and for two batches each; those that are late with an answer, or failed to transfer that very batch,
only if all are.

Where daemons keep states over epochs and batches come again, each has a *home*: the daemon whose endpoint hashes
highest with the batch's id (rendezvous hashing). Every rank and every epoch finds the same one, and of D daemons one
more moves only a share of 1 / (D + 1). A batch goes to its home unless that is down or late, or would need more than
FAR times as long as the best; elsewhere it is not kept, so that nothing is stored twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Generic, Literal

from specd.client.pace import KNOWN, Pace
from specd.client.pending import B, Pending, S
from specd.errors import BatchError

FAR = 4.0
"""A home that needs more than so many times as long as the best daemon does not get the batch."""
Keeping = Literal["anywhere", "home", "nowhere"]
"""Which daemon may keep a batch's states over epochs: whoever makes them, its home alone, or none."""


class Peer(Generic[S, B]):
    """One daemon. standby: it may never be up. session: None while it is down. pace: of this session.

    held: what takes its credits, by seq. keeps: whether it keeps states over epochs, as last known.
    """

    __slots__ = (
        "announce", "borrow", "credits", "endpoint", "held", "keeps", "pace", "payload_bytes", "place", "session",
        "slot_bytes", "standby",
    )  # fmt: skip

    def __init__(self, place: int, endpoint: str, standby: bool) -> None:
        self.place = place
        self.endpoint = endpoint
        self.standby = standby
        self.session: S | None = None
        self.credits = self.slot_bytes = self.payload_bytes = 0
        self.borrow = self.announce = self.keeps = False
        self.pace = Pace()
        self.held: dict[int, Pending[S, B]] = {}

    def open(
        self,
        session: S,
        credits: int,
        slot_bytes: int,
        payload_bytes: int,
        *,
        borrow: bool,
        announce: bool,
        keeps: bool,
    ) -> None:
        """A session is up; nothing is known of its pace."""
        assert self.session is None, f"two sessions with {self.endpoint}"
        self.session, self.credits = session, credits
        self.slot_bytes, self.payload_bytes = slot_bytes, payload_bytes
        self.borrow, self.announce, self.keeps = borrow, announce, keeps
        self.pace = Pace()

    @property
    def room(self) -> int:
        """How many more batches it would take now."""
        return self.credits - len(self.held) if self.session is not None else 0

    @property
    def trusted(self) -> int:
        """How many more batches it would be trusted with, beside others: as many as make its pace known, then all."""
        return self.room if self.pace.known else min(self.room, KNOWN - self.pace.owed)

    def avoided(self, pending: Pending[S, B], now: float) -> bool:
        """Whether a batch had better go elsewhere: an answer is late, or the transfer of that very batch failed."""
        return self.pace.late(now) or self.place == pending.missed_at

    def fits(self, pending: Pending[S, B]) -> bool:
        """Whether it takes what the batch brings, and the batch fits a slot of it; as last known."""
        return pending.layout.nbytes <= self.slot_bytes and pending.payload_bytes <= self.payload_bytes

    def takes(self, pending: Pending[S, B]) -> bool:
        """Whether it is up, and the batch fits it."""
        return self.session is not None and self.fits(pending)


class Peers(Generic[S, B]):
    """All daemons of a window, by their place among its endpoints. standby: places of those that may never be up.

    keeping: which of them may keep a batch's states over epochs.
    """

    def __init__(self, endpoints: Sequence[str], standby: Container[int] = (), keeping: Keeping = "anywhere") -> None:
        self._keeping = keeping
        self._peers: list[Peer[S, B]] = [
            Peer(place, endpoint, place in standby) for place, endpoint in enumerate(endpoints)
        ]

    def __iter__(self) -> Iterator[Peer[S, B]]:
        return iter(self._peers)

    def __getitem__(self, place: int) -> Peer[S, B]:
        return self._peers[place]

    def up(self, session: S) -> Peer[S, B] | None:
        """The daemon of a session that is up."""
        return next((peer for peer in self._peers if peer.session is session), None)

    def able(self, pending: Pending[S, B]) -> list[Peer[S, B]]:
        """Those that are up and have slots that the batch fits."""
        return [peer for peer in self._peers if peer.takes(pending)]

    def asked(self, pending: Pending[S, B]) -> list[Peer[S, B]]:
        """Those that owe an answer about a batch."""
        return [peer for peer in self._peers if peer.pace.asks(pending.seq)]

    def helpers(self, pending: Pending[S, B], now: float) -> list[Peer[S, B]]:
        """Those beside its own daemon that could bring a batch, have shown so, and are not late."""
        able = self.able(pending)
        return [peer for peer in able if peer.pace.known and not peer.pace.late(now) and peer.place != pending.daemon]

    def idle(self, now: float) -> list[Peer[S, B]]:
        """Those to be measured that have room for it."""
        return [peer for peer in self._peers if peer.room > 0 and peer.pace.due(now)]

    def choose(
        self, able: Sequence[Peer[S, B]], pending: Pending[S, B], ahead: Mapping[int, float], now: float
    ) -> Peer[S, B]:
        """Which of those that are able gets a batch. ahead: the cost of what waits for each already, by place."""
        best = self.first_to_finish(able, pending, ahead, now)
        home = self.home(pending)
        if home is None or home not in able or home.avoided(pending, now):
            return best
        if not (home.pace.known and best.pace.known):
            return home if home.trusted > 0 and not best.pace.known else best
        soonest, then = (
            each.pace.finish(ahead.get(each.place, 0) + self.cost(each, pending), now) for each in (best, home)
        )
        return home if then <= FAR * soonest else best

    def first_to_finish(
        self, able: Sequence[Peer[S, B]], pending: Pending[S, B], ahead: Mapping[int, float], now: float
    ) -> Peer[S, B]:
        """Who would bring a batch first. ahead: as of `choose`."""

        def order(peer: Peer[S, B]) -> tuple[bool, bool, bool, float, float]:
            pace, cost = peer.pace, ahead.get(peer.place, 0) + self.cost(peer, pending)
            avoided = peer.avoided(pending, now)
            # Nothing says when there will be room where there is none, unless the pace is known.
            full = peer.trusted <= 0 and (avoided or not pace.known)
            return avoided, not pace.known, full, pace.finish(cost, now), pace.waiting + cost

        return min(able, key=order)

    def cost(self, peer: Peer[S, B], pending: Pending[S, B]) -> float:
        """What a batch costs a daemon, in tokens of a forward."""
        return peer.pace.cost(pending.tokens, kept=self.may_keep(peer, pending))

    def home(self, pending: Pending[S, B]) -> Peer[S, B] | None:
        """The daemon that keeps a batch's states, up or not; None if that is no particular one."""
        if self._keeping != "home":
            return None
        keep = [peer for peer in self._peers if peer.keeps and not peer.standby and peer.fits(pending)]
        return max(keep, key=lambda peer: _score(pending.identity, peer.endpoint), default=None)

    def may_keep(self, peer: Peer[S, B], pending: Pending[S, B]) -> bool:
        """Whether a daemon that is asked for a batch may keep its states."""
        return self._keeping != "nowhere" and self.home(pending) in (None, peer)

    def unfit(self, pending: Pending[S, B]) -> BatchError | None:
        """Why a batch never comes: all daemons are up, and it fits no slot of any, or brings more than any takes."""
        if any(peer.session is None and not peer.standby for peer in self._peers):
            return None
        nbytes, largest = pending.layout.nbytes, max(peer.slot_bytes for peer in self._peers)
        if nbytes <= largest:
            most = max(peer.payload_bytes for peer in self._peers if peer.slot_bytes >= nbytes)
            if pending.payload_bytes <= most:
                return None
            return BatchError(
                f"{pending} brings {pending.payload_bytes} bytes of payloads and a daemon takes {most}: start it with "
                f"a larger ring.payload_mib, or train with a smaller data.batch_tokens"
            )
        return BatchError(
            f"{pending} needs {nbytes} bytes and the largest slot of any daemon has {largest}: start one with a larger "
            f"ring.slot_tokens, or train with a smaller data.batch_tokens"
        )


def _score(identity: bytes, endpoint: str) -> bytes:
    """The highest of these is a batch's home."""
    return hashlib.blake2b(identity + endpoint.encode(), digest_size=8).digest()
