"""Links and entries: each daemon a subscriber talks to, each batch it has under way. The flight's lock guards both."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import zmq

from specd.errors import SpecdError
from specd.protocol.messages import Submit

if TYPE_CHECKING:
    import torch

    from specd.client.handshake import Session
    from specd.protocol.batch import Batch, Layout
    from specd.protocol.messages import Ready


class State(enum.Enum):
    """Where a batch is."""

    PENDING = "waits for a daemon"
    SUBMITTED = "is being captured"
    READY = "waits to be fetched"
    FETCHING = "is being fetched"
    FETCHED = "is here"
    USED = "is being trained"


class Entry:
    """One batch under way.

    ready, session: the lease it has, and whose it is, while it has one. announced: whether RECV_READY was sent for it.
    began: when its transfer did, in monotonic seconds. fetch_s, forward_s: what its transfer took, and its target, the
    last time. buffer: its bytes once FETCHED, the borrowed slot's if it still has its lease. dropped: nobody wants it.
    """

    __slots__ = (
        "announced",
        "attempts",
        "batch",
        "began",
        "buffer",
        "dropped",
        "error",
        "fetch_s",
        "forward_s",
        "identity",
        "layout",
        "link",
        "ready",
        "seq",
        "session",
        "state",
    )

    def __init__(self, seq: int, batch: Batch, identity: bytes, layout: Layout) -> None:
        self.seq = seq
        self.batch = batch
        self.identity = identity
        self.layout = layout
        self.state = State.PENDING
        self.attempts = 0
        self.announced = False
        self.began = self.fetch_s = self.forward_s = 0.0
        self.dropped = False
        self.link: Link | None = None
        self.ready: Ready | None = None
        self.session: Session | None = None
        self.buffer: torch.Tensor | None = None
        self.error: SpecdError | None = None

    def request(self, epoch: bytes) -> Submit:
        """What asks a daemon for it."""
        return Submit(
            epoch=epoch,
            seq=self.seq,
            batch_id=self.identity,
            tokens=self.batch.tokens.astype("<i4", copy=False).tobytes(),
            lengths=self.batch.lengths.astype("<i4", copy=False).tobytes(),
        )

    def __str__(self) -> str:
        return f"batch {self.batch.index} of epoch {self.batch.epoch} (id {self.identity.hex()})"


class Link:
    """One endpoint: its session while it is up, and the entries that take its credits, by seq.

    broken: why the session has to be opened anew, as a thread found that may not touch its socket; else empty.
    """

    __slots__ = ("broken", "endpoint", "entries", "heard", "monitor", "problem", "renew_at", "session")

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.session: Session | None = None
        self.monitor: zmq.Socket[bytes] | None = None
        self.entries: dict[int, Entry] = {}
        self.problem = "not reached yet"
        self.broken = ""
        self.renew_at = self.heard = 0.0

    def open(self, session: Session) -> None:
        """The session is up."""
        self.monitor = session.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self.heard = self.renew_at = time.monotonic()
        self.broken = ""
        self.session = session

    def hang_up(self, reason: str) -> Session:
        """The session is over; returns it, for its transport to be closed by whoever may still use it."""
        session, self.session, self.problem = self.session, None, reason
        assert session is not None
        assert self.monitor is not None
        session.socket.disable_monitor()
        self.monitor.close(linger=0)
        session.hang_up()
        return session

    @property
    def room(self) -> int:
        """How many more batches its daemon would take now."""
        return self.session.welcome.credits - len(self.entries) if self.session else 0


Guard = Callable[..., None]
"""Runs a thread's body with its arguments, and sees to what it raises."""
