"""Peers: what the window knows of each daemon, and which of them gets a batch. Pure: no thread, no clock.

A batch goes to the daemon that would bring it first: everything that it owes and this one, at its measured pace. That
is earliest finish time, over an estimate that corrects itself: a slow daemon gets a batch only if it brings it before
the others would have come to it, so that nothing waits behind it. Daemons whose pace is not known are asked only while
no other is, evenly and for two batches each; those that are late with an answer, or failed to transfer that very batch,
only if all are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from typing import Generic

from specd.client.pace import KNOWN, Pace
from specd.client.pending import B, Pending, S
from specd.errors import BatchError


class Peer(Generic[S, B]):
    """One daemon. standby: it may never be up. session: None while it is down. pace: of this session.

    held: what takes its credits, by seq.
    """

    __slots__ = (
        "announce", "borrow", "credits", "endpoint", "held", "pace", "payload_bytes", "place", "session", "slot_bytes",
        "standby",
    )  # fmt: skip

    def __init__(self, place: int, endpoint: str, standby: bool) -> None:
        self.place = place
        self.endpoint = endpoint
        self.standby = standby
        self.session: S | None = None
        self.credits = self.slot_bytes = self.payload_bytes = 0
        self.borrow = self.announce = False
        self.pace = Pace()
        self.held: dict[int, Pending[S, B]] = {}

    def open(
        self, session: S, credits: int, slot_bytes: int, payload_bytes: int, *, borrow: bool, announce: bool
    ) -> None:
        """A session is up; nothing is known of its pace."""
        assert self.session is None, f"two sessions with {self.endpoint}"
        self.session, self.credits = session, credits
        self.slot_bytes, self.payload_bytes = slot_bytes, payload_bytes
        self.borrow, self.announce = borrow, announce
        self.pace = Pace()

    @property
    def room(self) -> int:
        """How many more batches it would take now."""
        return self.credits - len(self.held) if self.session is not None else 0

    @property
    def trusted(self) -> int:
        """How many more batches it would be trusted with, beside others: as many as make its pace known, then all."""
        return self.room if self.pace.known else min(self.room, KNOWN - self.pace.owed)

    def takes(self, pending: Pending[S, B]) -> bool:
        """Whether it is up, takes what the batch brings, and the batch fits a slot of it."""
        fits = pending.layout.nbytes <= self.slot_bytes and pending.payload_bytes <= self.payload_bytes
        return self.session is not None and fits


class Peers(Generic[S, B]):
    """All daemons of a window, by their place among its endpoints. standby: places of those that may never be up."""

    def __init__(self, endpoints: Sequence[str], standby: Container[int] = ()) -> None:
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


def first_to_finish(peers: Sequence[Peer[S, B]], pending: Pending[S, B], ahead: Counter[int], now: float) -> Peer[S, B]:
    """Who would bring a batch first. ahead: tokens that wait for each already, by place."""

    def order(peer: Peer[S, B]) -> tuple[bool, bool, bool, float, int]:
        pace, tokens = peer.pace, ahead[peer.place] + pending.tokens
        avoided = pace.late(now) or peer.place == pending.missed_at
        # Nothing says when there will be room where there is none, unless the pace is known.
        full = peer.trusted <= 0 and (avoided or not pace.known)
        return avoided, not pace.known, full, pace.finish(tokens, now), pace.waiting + tokens

    return min(peers, key=order)
