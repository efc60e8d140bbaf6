"""One batch in flight: where it is, whose credit it takes, and its lease."""

from __future__ import annotations

import enum
from typing import Generic, TypeVar

from specd.errors import SpecdError
from specd.protocol.batch import Batch, Layout
from specd.protocol.capture import CaptureSpec, covers
from specd.protocol.cut import cut
from specd.protocol.messages import Ready, Source, Submit
from specd.protocol.payload import total_bytes
from specd.transports.base import SlotRef

REST_S = 0.1
"""How long a batch rests after its second transfer failed; twice as long after each further one, up to MOST_REST_S."""
MOST_REST_S = 5.0

S = TypeVar("S")
"""A session."""
B = TypeVar("B")
"""The bytes of a batch: a staging buffer, or the view of a borrowed slot."""


def place_of(batch: Batch) -> int:
    """Where a batch stands in its plan: higher for a later one."""
    return (batch.epoch << 32) + batch.index


class State(enum.Enum):
    """Where a batch is."""

    PENDING = "waits for a daemon"
    SUBMITTED = "is being captured"
    READY = "waits to be fetched"
    FETCHING = "is being fetched"
    FETCHED = "is here"
    USED = "is being trained"
    OVER = "is over"


class Pending(Generic[S, B]):
    """One batch in flight.

    spec: the states it wants. place: in its plan. seq: its number, once it is added. daemon: who is to bring it and
    whose credit it takes, by its place among the endpoints; others may have been asked for copies. session, ready:
    whose lease it has, and the lease; a borrowed batch in use keeps both if the session is lost. announced: RECV_READY
    was sent for it. borrowed: its slot is read in place. source: where its states came from, as in READY. dropped: it
    is no longer wanted. buffer: its bytes while FETCHED or USED. error: why it never comes. submissions, misses: how
    often it was asked for, and how often its transfer failed. missed_at: whose did last, by place. problem: why it was
    retried last, empty if it was not. rests_until: when it may be submitted again, begun: when its transfer began, in
    the window's seconds. fetch_s, forward_s: seconds of its last transfer, and of its share of the target's forward.
    """

    __slots__ = (
        "announced", "batch", "begun", "borrowed", "buffer", "daemon", "dropped", "error", "fetch_s", "forward_s",
        "identity", "layout", "missed_at", "misses", "place", "problem", "ready", "rests_until", "seq", "session",
        "source", "spec", "state", "submissions",
    )  # fmt: skip

    def __init__(self, batch: Batch, identity: bytes, layout: Layout, spec: CaptureSpec, place: int = 0) -> None:
        self.seq = 0
        self.spec = spec
        self.place = place
        self.batch = batch
        self.identity = identity
        self.layout = layout
        self.state = State.PENDING
        self.submissions = self.misses = 0
        self.missed_at: int | None = None
        self.problem = ""
        self.rests_until = self.begun = 0.0
        self.announced = self.borrowed = self.dropped = False
        self.source: Source = "forward"
        self.fetch_s = self.forward_s = 0.0
        self.daemon: int | None = None
        self.session: S | None = None
        self.ready: Ready | None = None
        self.buffer: B | None = None
        self.error: SpecdError | None = None

    def request(self, epoch: bytes, *, keep: bool = True) -> Submit:
        """What asks a daemon for it. keep: whether that one may keep its states."""
        return Submit(
            epoch=epoch,
            seq=self.seq,
            batch_id=self.identity,
            tokens=self.batch.tokens.astype("<i4", copy=False).tobytes(),
            lengths=self.batch.lengths.astype("<i4", copy=False).tobytes(),
            payloads=self.batch.payloads,
            place=self.place,
            keep=keep,
        )

    def unlike(self, message: Ready) -> str:
        """What announces another batch than this, or not all of its states; empty if that is what it announces."""
        if message.batch_id != self.identity or message.layout != self.layout:
            return f"id {message.batch_id.hex()}, {message.layout}"
        return "" if covers(message.held, self.spec) else f"{message.held}, which does not cover {self.spec}"

    def miss(self, now: float) -> None:
        """Its transfer has failed: it rests, unless that was the first time, and had better go elsewhere."""
        self.misses += 1
        self.missed_at = self.daemon
        if self.misses > 1:
            self.rests_until = now + min(REST_S * 2 ** (self.misses - 2), MOST_REST_S)

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return self.batch.num_tokens

    @property
    def payload_bytes(self) -> int:
        """How many bytes its sequences bring for the target beside their tokens."""
        return total_bytes(self.batch.payloads)

    @property
    def ref(self) -> SlotRef:
        """The leased slot it lies in."""
        assert self.ready is not None
        assert self.ready.held is not None
        tokens, *_, hidden = self.layout.tensors[0].shape
        pieces = cut(self.ready.held, self.spec, hidden, tokens)
        return SlotRef(self.ready.slot, self.ready.generation, self.layout.nbytes, pieces)

    def __str__(self) -> str:
        return f"batch {self.batch.index} of epoch {self.batch.epoch} (id {self.identity.hex()})"
