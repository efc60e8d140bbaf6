"""The flight: the batches a subscriber has under way, and the threads that bring them home.

The dialer's threads (re)open sessions, the courier's owns their sockets, the fetcher's pulls ready slots. They share
one lock with the training loop, which only ever waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import zmq

from specd.client.artifacts import Artifacts
from specd.client.connect import Dialer
from specd.client.fetch import Fetcher
from specd.client.handshake import Session, Terms
from specd.client.io import Courier
from specd.client.state import Entry, Link, State
from specd.config.settings import SubscriberConfig
from specd.endpoints import resolve_endpoint
from specd.errors import BatchError, DaemonError, ProtocolError, RejectedError, SpecdError, TransportError
from specd.memory.streams import reached
from specd.metrics import Stats
from specd.protocol import messages as wire
from specd.protocol.messages import Message
from specd.transports.base import SlotRef

log = logging.getLogger(__name__)

RENEWALS_PER_TTL = 6


class Flight:
    """Brings submitted entries home over any number of daemons, whatever dies on the way.

    Everything public is called from one thread, the training loop's.
    """

    def __init__(
        self, config: SubscriberConfig, terms: Terms, context: zmq.Context[zmq.Socket[bytes]], stats: Stats
    ) -> None:
        self._config = config
        self._device = terms.device
        self._stats = stats
        self.lock = threading.Condition()
        self.links = [Link(resolve_endpoint(endpoint)) for endpoint in config.endpoints]
        self._entries: deque[Entry] = deque()
        self._in_use: set[Entry] = set()
        self.artifacts = Artifacts(self.lock, config.timeout_s, self._ask)
        self._fatal: SpecdError | None = None
        self._closing = threading.Event()
        self._down_since = time.monotonic()
        self._dialer = Dialer(context, terms, self._opened, self._closing, self._guard)
        self._fetcher = Fetcher(terms.device, config.depth + 2, self._begin_fetch, self._end_fetch, self._guard)
        self._courier = Courier(
            self.links, self.lock, self._act, self._lose, self._tend, self._fetcher.retire, self._guard
        )
        for link in self.links:
            self._dialer.dial(link)

    # For the subscriber

    def first_session(self) -> Session:
        """The first session that is up; waits for it. Raises what keeps all of them from opening."""
        with self.lock:
            while (session := self._session()) is None:
                self._check()
                self.lock.wait(0.5)
            return session

    def submit(self, entries: Iterable[Entry]) -> None:
        """Have batches captured; they come home by `take`, in this order."""
        with self.lock:
            self._entries.extend(entries)
        self._courier.kick()

    def take(self) -> Entry:
        """Wait for the oldest entry and charge the time to whom it waited for. Raises what keeps it from coming."""
        entry = self._entries[0]
        limit = time.monotonic() + self._config.timeout_s
        with self.lock:
            while entry.state is not State.FETCHED:
                if entry.error is not None:
                    raise entry.error
                self._check()
                begin = time.monotonic()
                if begin > limit:
                    raise DaemonError(
                        f"{entry} did not come within {self._config.timeout_s:g} s (subscriber.timeout_s): it "
                        f"{entry.state.value}, attempt {entry.attempts}; {self._problems()}"
                    )
                on_wire = entry.state in (State.READY, State.FETCHING)
                self.lock.wait(min(1.0, limit - begin))
                waited = time.monotonic() - begin
                self._stats.wire_wait_s += waited * on_wire
                self._stats.target_wait_s += waited * (not on_wire)
            if self._fatal is not None:
                raise self._fatal
            self._entries.popleft()
            entry.state = State.USED
            self._in_use.add(entry)
        return entry

    def recycle(self, entry: Entry) -> None:
        """Take an entry that was taken back, once the calling thread's current stream has done what it was told so far.

        Idempotent; `close` does it too.
        """
        if entry not in self._in_use:
            return
        self._in_use.remove(entry)
        buffer, entry.buffer = entry.buffer, None
        assert buffer is not None
        after, ready, session = reached(self._device), entry.ready, entry.session
        if session is None or ready is None:
            self._fetcher.recycle(buffer, after)
        else:
            ref = SlotRef(ready.slot, ready.generation, entry.layout.nbytes)
            self._fetcher.give_back(session, ref, after, partial(self._returned, entry))

    def drop_all(self) -> None:
        """Give up everything under way."""
        with self.lock:
            for entry in self._entries:
                entry.dropped = True
                if entry.state is State.FETCHED and entry.session is None:
                    assert entry.buffer is not None
                    self._fetcher.recycle(entry.buffer)
                elif entry.state is State.FETCHED or (entry.state is State.READY and not entry.announced):
                    self._let_go(entry)
                # A daemon that works on an entry announces it yet, and what it was told to send has to be received.
            self._entries.clear()

    def close(self) -> None:
        """End every session and thread. Idempotent."""
        if self._closing.is_set():
            return
        for entry in list(self._in_use):
            self._guard(self.recycle, entry)
        self.drop_all()
        self._closing.set()
        self._fetcher.stop()  # while there are sessions that a borrowed slot can be released in
        self._courier.stop()
        self._fetcher.close()
        self._dialer.join()
        self._courier.close()

    def __len__(self) -> int:
        return len(self._entries)

    # Waiting, on the subscriber's thread

    def _check(self) -> None:
        """Raise what ends the run: a fatal error, or no daemon for too long."""
        if self._fatal is not None:
            raise self._fatal
        down = time.monotonic() - self._down_since
        if down > self._config.connect_s and self._session() is None:
            raise DaemonError(
                f"no daemon for {down:.0f} s (subscriber.connect_s): {self._problems()}. Start one with "
                f"`specd start --model MODEL`, or name its --endpoint"
            )

    def _session(self) -> Session | None:
        return next((link.session for link in self.links if link.session), None)

    def _problems(self) -> str:
        return "; ".join(f"{link.endpoint}: {'up' if link.session else link.problem}" for link in self.links)

    def _ask(self, messages: Callable[[bytes], list[Message]], asked: Session | None) -> Session | None:
        """Send messages over the first session that is up, unless the one asked already is; returns the one asked."""
        self._check()
        if asked is not None and any(link.session is asked for link in self.links):
            return asked
        session = self._session()
        if session is not None:
            for message in messages(session.epoch):
                self._courier.post(session, message)
        return session

    # Sessions

    def _opened(self, link: Link, session: Session) -> bool:
        with self.lock:
            if self._closing.is_set():
                return False
            if (first := self._session()) is not None:  # two may have been met at the same moment
                one, other = (each.welcome.contract.fingerprint for each in (first, session))
                if one != other:
                    self._die(RejectedError(f"{session.endpoint} serves target {other}, {first.endpoint} serves {one}"))
                    return False
            link.open(session)
            self._stats.num_slots = session.welcome.ring.num_slots
            self.lock.notify_all()
        self._courier.kick()
        return True

    def _lose(self, link: Link, reason: str) -> None:
        """A session is over: what it worked on is pending again, and a new session is opened."""
        if link.session is None:
            return
        log.warning("lost %s: %s", link.endpoint, reason)
        self._fetcher.retire(link.hang_up(reason))
        for entry in list(link.entries.values()):
            if entry.state is State.USED:  # borrowed: its bytes stay, and there is nobody left to give them back to
                del link.entries[entry.seq]
                entry.link = None
            elif entry.state is not State.FETCHING:  # a transfer in flight verifies itself and decides
                self._retry(entry, reason)
        self._stats.reconnects += 1
        if self._session() is None:
            self._down_since = time.monotonic()
        self.lock.notify_all()
        self._dialer.dial(link)

    def _retry(self, entry: Entry, reason: str) -> None:
        """Make an entry pending again, or give it up after too many attempts."""
        self._let_go(entry)
        entry.state = State.PENDING
        if entry.dropped:
            return
        if entry.attempts >= self._config.max_attempts:
            entry.error = BatchError(f"{entry} failed {entry.attempts} times (subscriber.max_attempts): {reason}")
        else:
            self._stats.resubmitted += 1

    def _let_go(self, entry: Entry) -> None:
        """Take an entry from its link, and give the daemon its lease back."""
        link, ready, session = entry.link, entry.ready, entry.session
        entry.link = entry.ready = entry.session = None
        entry.announced = False
        if entry.state is State.FETCHED and session is not None:  # borrowed, and not looked at
            entry.buffer = None
            self._fetcher.unborrow(session)
        if link is None:
            return
        link.entries.pop(entry.seq, None)
        if ready is not None and session is not None and link.session is session:
            self._courier.post(session, wire.Release(epoch=session.epoch, lease=ready.lease))
        self._courier.kick()

    def _returned(self, entry: Entry, problem: TransportError | None) -> None:
        """The training stream no longer reads a borrowed slot."""
        with self.lock:
            self._let_go(entry)
        if problem is not None:
            log.error("%s was overwritten while it was borrowed: %s", entry, problem)
            self._die(TransportError(f"{entry} was overwritten while it was borrowed: {problem}"))

    # Threads

    def _guard(self, run: Callable[..., None], *args: Any) -> None:
        """Run a thread's body; what it raises ends the training loop's wait."""
        try:
            run(*args)
        except SpecdError as error:
            self._die(error)
        except Exception as error:
            log.exception("a subscriber thread failed")
            self._die(DaemonError(f"the subscriber failed: {error!r}"))

    def _die(self, error: SpecdError) -> None:
        with self.lock:
            self._fatal = self._fatal or error
            self.lock.notify_all()

    # The courier's thread

    def _act(self, link: Link, message: Any) -> None:
        match message:
            case wire.Ready():
                self._ready(link, message)
            case wire.Failed():
                entry = link.entries.get(message.seq)
                if message.retry:
                    self._lose(link, message.reason)
                elif entry is not None:
                    self._let_go(entry)
                    entry.error = BatchError(f"{entry} cannot be captured: {message.reason}")
            case wire.Revoke():
                self._lose(link, message.reason)
            case wire.Artifact():
                self.artifacts.arrived(message, link.endpoint)
            case wire.Renewed():
                pass
            case wire.Error():
                raise ProtocolError(f"{link.endpoint} refused a message: {message.reason}")
            case _:
                raise ProtocolError(f"{link.endpoint} sent {type(message).__name__}, which a trainer does not expect")

    def _ready(self, link: Link, message: wire.Ready) -> None:
        assert link.session is not None
        entry = link.entries.get(message.seq)
        self._stats.busy_slots = message.busy_slots
        if entry is None:
            raise ProtocolError(f"{link.endpoint} announced seq {message.seq}, which was not asked for")
        if message.batch_id != entry.identity or message.layout != entry.layout:
            raise ProtocolError(f"{link.endpoint} announced {entry} as id {message.batch_id.hex()}, {message.layout}")
        session = entry.session = link.session
        entry.ready, entry.state = message, State.READY
        if entry.dropped:
            self._let_go(entry)
            return
        entry.forward_s = message.target_us / 1e6
        if session.borrow:
            self._courier.say(session, wire.Borrow(epoch=session.epoch, lease=message.lease))  # before there is a view
        elif session.needs_recv_ready:
            entry.announced = True
            self._courier.say(session, wire.RecvReady(epoch=session.epoch, lease=message.lease))
        self._fetcher.fetch(entry, session)

    def _tend(self) -> None:
        self._renew()
        self._submit()

    def _renew(self) -> None:
        """Keep leases alive; a daemon that has not answered for half their life is lost."""
        now = time.monotonic()
        for link in self.links:
            session = link.session
            if session is None:
                continue
            ttl_s = session.welcome.lease_ttl_ms / 1000
            if link.broken:
                self._lose(link, link.broken)
            elif now - link.heard > ttl_s / 2:
                self._lose(link, f"it has not answered for {now - link.heard:.1f} s")
            elif now >= link.renew_at:
                link.renew_at = now + ttl_s / RENEWALS_PER_TTL
                self._courier.post(session, wire.Renew(epoch=session.epoch))

    def _submit(self) -> None:
        """Submit pending entries in order to whoever has most room."""
        for entry in self._entries:
            if entry.state is not State.PENDING or entry.error is not None:
                continue
            link = max(self.links, key=lambda link: link.room)
            if link.session is None or link.room <= 0:
                if entry is self._entries[0]:
                    self._make_room()
                break
            entry.link, entry.state = link, State.SUBMITTED
            entry.attempts += 1
            link.entries[entry.seq] = entry
            self._courier.post(link.session, entry.request(link.session.epoch))

    def _make_room(self) -> None:
        """Give the last borrowed batch back that nobody has looked at: the one that is waited for needs its credit."""
        for entry in reversed(self._entries):
            if entry.state is State.FETCHED and entry.session is not None:
                self._let_go(entry)
                entry.state = State.PENDING
                entry.attempts -= 1
                return

    # The fetcher's thread

    def _begin_fetch(self, entry: Entry, session: Session) -> SlotRef | None:
        with self.lock:
            ready, link = entry.ready, entry.link
            if entry.state is not State.READY or ready is None or link is None or link.session is not session:
                return None
            if link.broken or self._closing.is_set():
                return None
            entry.state, entry.began = State.FETCHING, time.monotonic()
            return SlotRef(ready.slot, ready.generation, entry.layout.nbytes)

    def _end_fetch(
        self, entry: Entry, session: Session, buffer: torch.Tensor | None, error: TransportError | None
    ) -> None:
        with self.lock:
            link = entry.link
            entry.fetch_s = time.monotonic() - entry.began
            problem = "" if error is None else str(error)
            if error is not None and error.lost and link is not None and link.session is session:
                link.broken = problem
            if buffer is not None and session.borrow:
                entry.buffer, entry.state = buffer, State.FETCHED
                if entry.dropped:
                    self._let_go(entry)
                elif link is None or link.session is not session:
                    problem = "its session was lost"
            elif buffer is not None:
                self._let_go(entry)
                if entry.dropped:
                    self._fetcher.recycle(buffer)
                else:
                    entry.buffer, entry.state = buffer, State.FETCHED
            if problem:
                log.warning("%s: %s did not arrive: %s", session.endpoint, entry, problem)
                self._retry(entry, problem)
            self._courier.kick()
            self.lock.notify_all()
