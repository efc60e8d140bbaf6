"""The window: the batches a subscriber has in flight, as a pure state machine without thread, lock or socket.

Batches leave it by `take` in the order they were added in, each exactly once, or with an error that names it:

    PENDING ──▶ SUBMITTED ──ready──▶ READY ──begin──▶ FETCHING ──fetched──▶ FETCHED ──take──▶ USED ──give_back──▶ OVER
       ▲            │                  │                 │                     │
       └────────────┴───── retry ──────┴─────────────────┴─────────────────────┘

**Who gets a batch.** After every change, pending batches are dealt out in order, each to the daemon that would bring it
first, or that keeps it (`peers.py`), at its measured pace (`pace.py`), among those whose slots it fits. If that daemon
has no room, the batch waits for it, and the next ones are looked at. The first batch is what training waits for: it
goes to one that has room, and if none has, the last borrowed batch that was not taken yet is released and retried.

**Copies.** Requests are idempotent, so a batch may be asked of several daemons: whoever announces it first brings it,
and what others announce is released. If the first batch is late, another daemon is asked for it too (`tick`), unless
that one would need longer than the first was silent for. And a daemon that owes nothing, and is not known or has not
been asked for some time, is measured by a copy of the last batch that others were asked for: nothing ever waits for it.

**Credits.** Each request takes one credit of its daemon until it is over: its lease ended, because the batch is fetched
or, if it is borrowed (its slot is read in place), because the training stream has read it; or it was refused.

A lost session takes its requests and leases along; its batches are retried. Two kinds stay: a transfer in flight
verifies itself and decides, and a borrowed batch in use keeps its bytes. Nothing counts against a batch but a daemon's
word that it cannot be captured; one whose transfers fail again and again rests in between.

Every method returns what is to be done now (`effects.py`), in order. Messages and transfers are only for sessions that
are up; views are dropped in lost ones too, whose transport closes with the last. Sessions and buffers are mere tokens.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Generic

from specd.client import effects
from specd.client.effects import Effect
from specd.client.pace import Pace
from specd.client.peers import Peer, Peers
from specd.client.pending import B, Pending, S, State
from specd.errors import BatchError, ProtocolError
from specd.protocol.messages import Ready
from specd.transports.base import SlotRef


class Window(Generic[S, B]):
    """The batches in flight over any number of daemons. Not thread-safe.

    peers: the daemons, none of which is up yet. clock: monotonic seconds. resubmitted: how often a batch was pending
    again because its session or transfer failed.
    """

    def __init__(self, peers: Peers[S, B], clock: Callable[[], float]) -> None:
        self._peers = peers
        self._clock = clock
        self._batches: deque[Pending[S, B]] = deque()
        self._in_use: set[Pending[S, B]] = set()
        self._last_seq = 0
        self._moved = 0.0
        """When a transfer ended last: they are made one after the other."""
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

    def tick(self) -> list[Effect[S, B]]:
        """Time has passed while the first batch was waited for: look for what is late, or has rested."""
        if self._batches:
            now = self._clock()
            self._hedge(now)
            self._cut_off(now)
        return self._settle()

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
        self,
        daemon: int,
        session: S,
        credits: int,
        slot_bytes: int,
        payload_bytes: int = 0,
        *,
        borrow: bool = False,
        announce: bool = False,
        keeps: bool = False,
    ) -> list[Effect[S, B]]:
        """A session with a daemon, given by its place among the endpoints, is up.

        slot_bytes: most that a batch may have. payload_bytes: most that its payloads may. borrow: its slots are read in
        place. announce: its transport sends only after RECV_READY. keeps: it keeps states over epochs.
        """
        peer = self._peers[daemon]
        peer.open(session, credits, slot_bytes, payload_bytes, borrow=borrow, announce=announce, keeps=keeps)
        return self._settle()

    def lost(self, session: S, reason: str) -> list[Effect[S, B]]:
        """A session is over. Ignored if it was before."""
        self._lose(session, reason)
        return self._settle()

    def ready(self, session: S, message: Ready) -> list[Effect[S, B]]:
        """A batch lies in its slot. Ignored in a session that is over.

        Raises ProtocolError for a batch that is not being captured in it, or is another than was asked for.
        """
        peer = self._peers.up(session)
        if peer is None:
            return []
        if not peer.pace.asks(message.seq):
            raise ProtocolError(f"{peer.endpoint} announced seq {message.seq}, which was not asked for")
        pending = peer.held[message.seq]
        if problem := pending.unlike(message):
            raise ProtocolError(f"{peer.endpoint} announced {pending} as {problem}")
        peer.pace.answer(message.seq, message.target_us / 1e6, self._clock(), replayed=message.source == "replay")
        if pending.state is not State.SUBMITTED or pending.dropped:  # another was first, or nobody wants it any more
            self._todo.append(effects.SendRelease(session, message.lease))
            self._refused(peer, pending)
            return self._settle()
        pending.daemon, pending.session, pending.ready, pending.state = peer.place, session, message, State.READY
        pending.forward_s, pending.source = message.target_us / 1e6, message.source
        if peer.borrow and pending.ref.begin is not None:
            pending.borrowed = True
            self._todo.append(effects.SendBorrow(session, message.lease))
        elif peer.announce:
            pending.announced = True
            self._todo.append(effects.SendRecvReady(session, message.lease))
        self._todo.append(effects.FetchSlot(session, pending))
        return self._settle()

    def failed(self, session: S, seq: int, reason: str) -> list[Effect[S, B]]:
        """A batch cannot be captured. Ignored for one that is not being captured in this session.

        It fails unless another daemon was asked for it too.
        """
        peer = self._peers.up(session)
        if peer is not None and peer.pace.asks(seq):
            pending = peer.held[seq]
            if self._refused(peer, pending) and not pending.dropped:
                pending.error = BatchError(f"{pending} cannot be captured: {reason}")
        return self._settle()

    # Transfers

    def begin(self, pending: Pending[S, B], session: S) -> SlotRef | None:
        """A `FetchSlot` begins: from which slot; None if the batch is no longer READY in that session."""
        if pending.state is not State.READY or pending.session is not session:
            return None
        pending.state, pending.begun = State.FETCHING, self._clock()
        return pending.ref

    def fetched(self, pending: Pending[S, B], buffer: B, took_s: float) -> list[Effect[S, B]]:
        """A transfer brought a batch, or the view of its borrowed slot."""
        assert pending.state is State.FETCHING, f"{pending} {pending.state.value}"
        pending.fetch_s = took_s
        self._moved = self._clock()
        if self._leased(pending) and pending.daemon is not None:
            self._peers[pending.daemon].pace.fetch(pending.seq, took_s)
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
        self._moved = self._clock()
        pending.miss(self._moved)
        if lost and self._leased(pending):
            self._todo.append(effects.Abandon(pending.session, reason))
            self._lose(pending.session, reason)
        self._miss(pending, reason)
        return self._settle()

    # Transitions

    def _settle(self) -> list[Effect[S, B]]:
        """Submit what is pending as far as there is room, and return all that is to be done."""
        now, ahead = self._clock(), defaultdict[int, float](float)
        for pending in self._batches:
            if pending.state is State.PENDING and pending.rests_until <= now:
                self._deal(pending, ahead, now)
        for peer in self._peers.idle(now):
            self._measure(peer)
        todo, self._todo = self._todo, []
        return todo

    def _deal(self, pending: Pending[S, B], ahead: dict[int, float], now: float) -> None:
        """Submit a pending batch, or let it wait for its daemon. ahead: what waits for each already, by place."""
        able = self._peers.able(pending)
        if pending is self.first:
            able = self._with_room(able)
        if able:
            peer = self._peers.choose(able, pending, ahead, now)
            if peer.room > 0 and (peer.trusted > 0 or len(able) == 1 or pending is self.first):
                pending.daemon, pending.state = peer.place, State.SUBMITTED
                self._ask(peer, pending)
            else:
                ahead[peer.place] += self._peers.cost(peer, pending)
        elif (error := self._peers.unfit(pending)) is not None:
            pending.state, pending.error = State.OVER, error

    def _ask(self, peer: Peer[S, B], pending: Pending[S, B], late: float = 0.0) -> None:
        assert peer.session is not None
        peer.held[pending.seq] = pending
        keep = self._peers.may_keep(peer, pending)
        peer.pace.ask(pending.seq, pending.tokens, self._clock(), kept=keep)
        pending.submissions += 1
        self._todo.append(effects.SendSubmit(peer.session, pending, late, keep))

    def _measure(self, peer: Peer[S, B]) -> None:
        """Ask for a copy of the last batch that others are asked for, if there is one."""
        for pending in reversed(self._batches):
            if pending.state is State.SUBMITTED and peer.takes(pending):
                self._ask(peer, pending)
                return

    def _hedge(self, now: float) -> None:
        """Ask another daemon for the first batch, too, if all that were asked for it are late."""
        first, asked = self.first, self._peers.asked(self.first)
        if first.state is State.SUBMITTED and all(peer.pace.late(now) for peer in asked):
            late = min(peer.pace.silence(now) for peer in asked)
            able = [peer for peer in self._peers.helpers(first, now) if peer.pace.finish(first.tokens, now) < late]
            if able := self._with_room(able):
                self._ask(self._peers.first_to_finish(able, first, {}, now), first, late)

    def _cut_off(self, now: float) -> None:
        """Cancel a transfer that is late, because all others wait for it, if another daemon could bring its batch."""
        for pending in self._batches:
            if pending.state is State.FETCHING and self._leased(pending) and self._peers.helpers(pending, now):
                assert pending.daemon is not None
                assert pending.session is not None
                took_s = now - max(pending.begun, self._moved)
                if self._peers[pending.daemon].pace.stalls(took_s, pending.tokens):
                    pending.begun = float("inf")  # once
                    self._todo.append(effects.Cancel(pending.session, f"a transfer has not ended for {took_s:.1f} s"))

    def _with_room(self, able: list[Peer[S, B]]) -> list[Peer[S, B]]:
        """Those that have room. If none has, release the last batches of theirs that are borrowed and not taken."""
        while not (found := [peer for peer in able if peer.room > 0]):
            places = [peer.place for peer in able]
            for pending in reversed(self._batches):
                if pending.state is State.FETCHED and pending.borrowed and pending.daemon in places:
                    self._let_go(pending, State.PENDING)
                    self._fall_back(pending)
                    break
            else:
                break
        return found

    def _lose(self, session: S, reason: str) -> None:
        peer = self._peers.up(session)
        if peer is None:
            return
        peer.session, peer.pace = None, Pace()
        for pending in list(peer.held.values()):
            if pending.daemon != peer.place:  # a copy
                del peer.held[pending.seq]
            elif pending.state is State.USED:  # its lease ended with the session; its bytes stay mapped
                del peer.held[pending.seq]
                pending.daemon = None
            elif pending.state is not State.FETCHING:
                self._retry(pending, reason)

    def _miss(self, pending: Pending[S, B], reason: str) -> None:
        assert pending.session is not None
        self._todo.append(effects.Missed(pending.session, pending, reason))
        self._retry(pending, reason)

    def _retry(self, pending: Pending[S, B], reason: str) -> None:
        """Have a batch captured again."""
        self._let_go(pending, State.OVER if pending.dropped else State.PENDING)
        if not pending.dropped:
            pending.problem = reason
            self.resubmitted += not self._fall_back(pending)

    def _fall_back(self, pending: Pending[S, B]) -> bool:
        """Leave a batch that nobody brings to a daemon that was asked for a copy; False if there is none."""
        for peer in self._peers.asked(pending):
            pending.daemon, pending.state = peer.place, State.SUBMITTED
            return True
        return False

    def _refused(self, peer: Peer[S, B], pending: Pending[S, B]) -> bool:
        """End a request that brings nothing; whether its batch is over, because nobody else was asked."""
        peer.pace.forget(pending.seq, self._clock())
        if pending.daemon != peer.place:  # a copy
            del peer.held[pending.seq]
            return False
        self._let_go(pending, State.OVER)
        return pending.dropped or not self._fall_back(pending)

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
            peer = self._peers[pending.daemon]
            del peer.held[pending.seq]
            peer.pace.forget(pending.seq, self._clock())
        pending.daemon = pending.session = pending.ready = None
        pending.announced = pending.borrowed = False
        pending.state = state

    def _recycle(self, pending: Pending[S, B]) -> None:
        """Give up the staging buffer of a batch that is over."""
        buffer, pending.buffer = pending.buffer, None
        assert buffer is not None
        pending.state = State.OVER
        self._todo.append(effects.Recycle(buffer))

    def _leased(self, pending: Pending[S, B]) -> bool:
        """Whether the session that a batch was READY in is still up."""
        return pending.daemon is not None and self._peers[pending.daemon].session is pending.session
