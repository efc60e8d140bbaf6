"""The window: the batches a subscriber has in flight, as a pure state machine without thread, lock, socket or clock.

Batches leave it by `take` in the order they were added in, each exactly once, or with an error that names it:

    PENDING ──▶ SUBMITTED ──ready──▶ READY ──begin──▶ FETCHING ──fetched──▶ FETCHED ──take──▶ USED ──give_back──▶ OVER
       ▲            │                  │                 │                     │
       └────────────┴───── retry ──────┴─────────────────┴─────────────────────┘

A batch takes one credit of its daemon from SUBMITTED until its lease ends: when it is fetched or, if it is borrowed
(its slot is read in place), when the training stream has read it. After every change, pending batches are submitted in
order, each to the daemon with most room: credits minus the batches that take them. If none has room for the first
batch, the last borrowed one that was not taken yet is released and retried, without counting an attempt: batches that
wait behind the first one must not hold the credit that it needs.

A lost session takes its leases along; its batches are retried, up to `max_attempts` submissions each. Two kinds stay: a
transfer in flight verifies itself and decides, and a borrowed batch in use keeps its bytes.

Every method returns what is to be done now (`effects.py`), in order. Messages and transfers are only for sessions that
are up; views are dropped in lost ones too, whose transport is closed when none is left. Sessions and buffers are opaque
tokens, told apart by identity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Generic

from specd.client import effects
from specd.client.effects import Effect
from specd.client.pending import B, Pending, S, State
from specd.errors import BatchError, ProtocolError
from specd.protocol.messages import Ready
from specd.transports.base import SlotRef


class _Daemon(Generic[S, B]):
    """One endpoint. session: None while it is down. held: the batches that take its credits, by seq."""

    __slots__ = ("announce", "borrow", "credits", "endpoint", "held", "session")

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.session: S | None = None
        self.credits = 0
        self.borrow = self.announce = False
        self.held: dict[int, Pending[S, B]] = {}

    @property
    def room(self) -> int:
        """How many more batches it would take now."""
        return self.credits - len(self.held) if self.session is not None else 0


class Window(Generic[S, B]):
    """The batches in flight over any number of daemons. Not thread-safe.

    resubmitted: how often a batch was pending again because its session or its transfer failed.
    """

    def __init__(self, endpoints: Sequence[str], max_attempts: int) -> None:
        self._daemons: list[_Daemon[S, B]] = [_Daemon(endpoint) for endpoint in endpoints]
        self._max_attempts = max_attempts
        self._batches: deque[Pending[S, B]] = deque()
        self._in_use: set[Pending[S, B]] = set()
        self._last_seq = 0
        self._todo: list[Effect[S, B]] = []
        self.resubmitted = 0

    def __len__(self) -> int:
        """How many batches are still to be taken."""
        return len(self._batches)

    def __repr__(self) -> str:
        states = ", ".join(f"{pending.seq} {pending.state.value}" for pending in self._batches)
        return f"Window({states or 'nothing in flight'}; {len(self._in_use)} in use)"

    # The training loop

    @property
    def first(self) -> Pending[S, B]:
        """The batch that is taken next."""
        return self._batches[0]

    @property
    def in_use(self) -> list[Pending[S, B]]:
        """Batches that were taken and not given back."""
        return list(self._in_use)

    def add(self, batches: Iterable[Pending[S, B]]) -> list[Effect[S, B]]:
        """Have batches captured, behind those in flight."""
        for pending in batches:
            self._last_seq += 1
            pending.seq = self._last_seq
            self._batches.append(pending)
        return self._settle()

    def here(self) -> bool:
        """Whether the first batch can be taken. Raises what keeps it from ever coming."""
        if self.first.error is not None:
            raise self.first.error
        return self.first.state is State.FETCHED

    def take(self) -> list[Effect[S, B]]:
        """The first batch, which is here, is in use until it is given back."""
        assert self.here(), f"{self.first} {self.first.state.value}"
        pending = self._batches.popleft()
        pending.state = State.USED
        self._in_use.add(pending)
        return self._settle()

    def give_back(self, pending: Pending[S, B]) -> list[Effect[S, B]]:
        """Nothing more will be launched that reads a batch in use. Idempotent."""
        if pending not in self._in_use:
            return []
        self._in_use.remove(pending)
        if not pending.borrowed:
            self._recycle(pending)
            return self._settle()
        assert pending.session is not None
        pending.buffer = None
        return [effects.Return(pending.session, pending.ref, pending)]

    def returned(self, pending: Pending[S, B]) -> list[Effect[S, B]]:
        """The training stream has read a borrowed batch that was given back."""
        self._let_go(pending, State.OVER)
        return self._settle()

    def drop(self) -> list[Effect[S, B]]:
        """Give up every batch that was not taken."""
        for pending in self._batches:
            pending.dropped = True
            if pending.state is State.FETCHED and not pending.borrowed:
                self._recycle(pending)
            elif pending.state in (State.PENDING, State.FETCHED) or (
                pending.state is State.READY and not pending.announced
            ):
                self._let_go(pending, State.OVER)
            # READY still comes for those that are SUBMITTED; an announced one must be received.
        self._batches.clear()
        return self._settle()

    # Sessions

    def opened(
        self, daemon: int, session: S, credits: int, *, borrow: bool = False, announce: bool = False
    ) -> list[Effect[S, B]]:
        """A session with a daemon, given by its place among the endpoints, is up.

        borrow: its slots are read in place. announce: its transport sends only after RECV_READY.
        """
        opened = self._daemons[daemon]
        assert opened.session is None, f"two sessions with {opened.endpoint}"
        opened.session, opened.credits, opened.borrow, opened.announce = session, credits, borrow, announce
        return self._settle()

    def lost(self, session: S, reason: str) -> list[Effect[S, B]]:
        """A session is over. Ignored if it was before."""
        self._lose(session, reason)
        return self._settle()

    def ready(self, session: S, message: Ready) -> list[Effect[S, B]]:
        """A batch lies in its slot. Ignored in a session that is over.

        Raises ProtocolError for a batch that is not being captured in it, or is another than was asked for.
        """
        daemon = self._up(session)
        if daemon is None:
            return []
        pending = daemon.held.get(message.seq)
        if pending is None or pending.state is not State.SUBMITTED:
            raise ProtocolError(f"{daemon.endpoint} announced seq {message.seq}, which was not asked for")
        if message.batch_id != pending.identity or message.layout != pending.layout:
            identity = message.batch_id.hex()
            raise ProtocolError(f"{daemon.endpoint} announced {pending} as id {identity}, {message.layout}")
        pending.session, pending.ready, pending.state = session, message, State.READY
        if pending.dropped:
            self._let_go(pending, State.OVER)
            return self._settle()
        pending.forward_s = message.target_us / 1e6
        if daemon.borrow:
            pending.borrowed = True
            self._todo.append(effects.SendBorrow(session, message.lease))
        elif daemon.announce:
            pending.announced = True
            self._todo.append(effects.SendRecvReady(session, message.lease))
        self._todo.append(effects.FetchSlot(session, pending))
        return self._settle()

    def failed(self, session: S, seq: int, reason: str) -> list[Effect[S, B]]:
        """A batch cannot be captured. Ignored for one that is not being captured in this session."""
        daemon = self._up(session)
        pending = daemon.held.get(seq) if daemon is not None else None
        if pending is not None and pending.state is State.SUBMITTED:
            self._let_go(pending, State.OVER)
            pending.error = BatchError(f"{pending} cannot be captured: {reason}")
        return self._settle()

    # Transfers

    def begin(self, pending: Pending[S, B], session: S) -> SlotRef | None:
        """A `FetchSlot` begins: from which slot; None if the batch is no longer READY in that session."""
        if pending.state is not State.READY or pending.session is not session:
            return None
        pending.state = State.FETCHING
        return pending.ref

    def fetched(self, pending: Pending[S, B], buffer: B, took_s: float) -> list[Effect[S, B]]:
        """A transfer brought a batch, or the view of its borrowed slot."""
        assert pending.state is State.FETCHING, f"{pending} {pending.state.value}"
        pending.fetch_s = took_s
        if not pending.borrowed:
            self._let_go(pending, State.FETCHED)
            pending.buffer = buffer
            if pending.dropped:
                self._recycle(pending)
            return self._settle()
        pending.buffer, pending.state = buffer, State.FETCHED
        if pending.dropped:
            self._let_go(pending, State.OVER)
        elif not self._leased(pending):
            self._miss(pending, "its session was lost")
        return self._settle()

    def missed(self, pending: Pending[S, B], reason: str, took_s: float, *, lost: bool) -> list[Effect[S, B]]:
        """A transfer failed. lost: and with it the transport of its session."""
        assert pending.state is State.FETCHING, f"{pending} {pending.state.value}"
        assert pending.session is not None
        pending.fetch_s = took_s
        if lost and self._leased(pending):
            self._todo.append(effects.Abandon(pending.session, reason))
            self._lose(pending.session, reason)
        self._miss(pending, reason)
        return self._settle()

    # Transitions

    def _settle(self) -> list[Effect[S, B]]:
        """Submit what is pending as far as there is room, and return all that is to be done."""
        for pending in self._batches:
            if pending.state is not State.PENDING:
                continue
            place = self._roomiest()
            while self._daemons[place].room <= 0 and pending is self.first and self._make_room():
                place = self._roomiest()
            daemon = self._daemons[place]
            if daemon.session is None or daemon.room <= 0:
                break
            pending.daemon, pending.state = place, State.SUBMITTED
            pending.attempts += 1
            daemon.held[pending.seq] = pending
            self._todo.append(effects.SendSubmit(daemon.session, pending))
        todo, self._todo = self._todo, []
        return todo

    def _roomiest(self) -> int:
        return max(range(len(self._daemons)), key=lambda place: self._daemons[place].room)

    def _make_room(self) -> bool:
        """Give back the last borrowed batch that was not taken yet; False if there is none."""
        for pending in reversed(self._batches):
            if pending.state is State.FETCHED and pending.borrowed:
                self._let_go(pending, State.PENDING)
                pending.attempts -= 1
                return True
        return False

    def _lose(self, session: S, reason: str) -> None:
        daemon = self._up(session)
        if daemon is None:
            return
        daemon.session = None
        for pending in list(daemon.held.values()):
            if pending.state is State.USED:  # its lease ended with the session; its bytes stay mapped
                del daemon.held[pending.seq]
                pending.daemon = None
            elif pending.state is not State.FETCHING:
                self._retry(pending, reason)

    def _miss(self, pending: Pending[S, B], reason: str) -> None:
        assert pending.session is not None
        self._todo.append(effects.Missed(pending.session, pending, reason))
        self._retry(pending, reason)

    def _retry(self, pending: Pending[S, B], reason: str) -> None:
        """Make a batch pending again, or give it up after too many attempts."""
        self._let_go(pending, State.OVER)
        if pending.dropped:
            return
        if pending.attempts < self._max_attempts:
            pending.state = State.PENDING
            self.resubmitted += 1
        else:
            why = f"failed {pending.attempts} times (subscriber.max_attempts): {reason}"
            pending.error = BatchError(f"{pending} {why}")

    def _let_go(self, pending: Pending[S, B], state: State) -> None:
        """End a batch's lease and give the credit back; it is in `state` then."""
        session, ready = pending.session, pending.ready
        if session is not None and ready is not None:
            if pending.state is State.FETCHED:  # borrowed: a fetched copy has no lease
                pending.buffer = None
                self._todo.append(effects.Unborrow(session))
            if self._leased(pending):
                self._todo.append(effects.SendRelease(session, ready.lease))
        if pending.daemon is not None:
            del self._daemons[pending.daemon].held[pending.seq]
        pending.daemon = pending.session = pending.ready = None
        pending.announced = pending.borrowed = False
        pending.state = state

    def _recycle(self, pending: Pending[S, B]) -> None:
        """Give up the staging buffer of a batch that is over."""
        buffer, pending.buffer = pending.buffer, None
        assert buffer is not None
        pending.state = State.OVER
        self._todo.append(effects.Recycle(buffer))

    def _up(self, session: S) -> _Daemon[S, B] | None:
        return next((daemon for daemon in self._daemons if daemon.session is session), None)

    def _leased(self, pending: Pending[S, B]) -> bool:
        """Whether the session that a batch was READY in is still up."""
        return pending.daemon is not None and self._daemons[pending.daemon].session is pending.session
