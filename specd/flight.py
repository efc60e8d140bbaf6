"""The flight: the batches a subscriber has under way, and the threads that bring them home.

The I/O thread owns the sessions' sockets, the fetcher's thread pulls ready slots, and a short-lived thread per endpoint
(re)opens its session. They share one lock with the training loop, which only ever waits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
import zmq
from zmq.utils.monitor import recv_monitor_message

from specd import protocol as wire
from specd.artifacts import Artifacts
from specd.config import SubscriberConfig, resolve_endpoint
from specd.errors import BatchError, DaemonError, ProtocolError, SpecdError
from specd.fetcher import Fetcher
from specd.links import Entry, Link, State
from specd.metrics import Stats
from specd.protocol import Message
from specd.session import Later, Session, Terms, open_session
from specd.transport import SlotRef

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
        self._terms = terms
        self._context = context
        self._stats = stats
        self.lock = threading.Condition()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self.links = [Link(resolve_endpoint(endpoint)) for endpoint in config.endpoints]
        self._entries: deque[Entry] = deque()
        self._outbox: deque[tuple[Session, Message]] = deque()
        self.artifacts = Artifacts(self.lock, config.timeout_s, self._ask)
        self._fatal: SpecdError | None = None
        self._closing = threading.Event()
        self._down_since = time.monotonic()
        self._connecting: set[threading.Thread] = set()
        self._fetcher = Fetcher(terms.device, self._begin_fetch, self._end_fetch, self._guard)
        self._io = threading.Thread(target=self._guard, args=(self._run_io,), name="specd-io", daemon=True)
        self._io.start()
        for link in self.links:
            self._connect(link)

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
        self._kick()

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
            self._entries.popleft()
        return entry

    def recycle(self, buffer: torch.Tensor) -> None:
        """Take the buffer of an entry back; its bytes may be overwritten from now on."""
        self._fetcher.recycle(buffer)

    def drop_all(self) -> None:
        """Give up everything under way."""
        with self.lock:
            for entry in self._entries:
                entry.dropped = True
                if entry.state is not State.SUBMITTED:  # until it is announced it still takes a credit
                    self._let_go(entry)
            self._entries.clear()

    def close(self) -> None:
        """End every session and thread. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._kick()
        self._io.join()
        self._fetcher.close()
        for thread in self._connecting:
            thread.join()
        os.close(self._wake)

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
            self._outbox.extend((session, message) for message in messages(session.epoch))
            self._kick()
        return session

    # Sessions

    def _connect(self, link: Link) -> None:
        """Open a session with an endpoint on a thread of its own."""
        thread = threading.Thread(target=self._guard, args=(self._run_connect, link), name="specd-connect", daemon=True)
        self._connecting = {other for other in self._connecting if other.is_alive()} | {thread}
        thread.start()

    def _run_connect(self, link: Link) -> None:
        said = False
        while not self._closing.is_set():
            try:
                session = open_session(self._context, link.endpoint, self._terms, self._closing.wait)
            except Later as reason:
                link.problem = str(reason)
                if not said:
                    log.warning("waiting for %s: %s", link.endpoint, reason)
                    said = True
                continue
            with self.lock:
                if self._closing.is_set():
                    session.client.close()
                    session.socket.close(linger=0)
                    return
                # The first target met is the one every other daemon, and every later life of it, must serve.
                self._terms = self._terms._replace(fingerprint=session.welcome.contract.fingerprint)
                link.open(session)
                self._stats.num_slots = session.welcome.ring.num_slots
                self.lock.notify_all()
            self._kick()
            return

    def _lose(self, link: Link, reason: str) -> None:
        """A session is over: what it worked on is pending again, and a new session is opened."""
        if link.session is None:
            return
        log.warning("lost %s: %s", link.endpoint, reason)
        self._fetcher.retire(link.hang_up(reason))
        for entry in list(link.entries.values()):
            if entry.state is not State.FETCHING:  # a transfer in flight verifies itself and decides
                self._retry(entry, reason)
        self._stats.reconnects += 1
        if self._session() is None:
            self._down_since = time.monotonic()
        self.lock.notify_all()
        self._connect(link)

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
        link, entry.link = entry.link, None
        if link is None:
            return
        link.entries.pop(entry.seq, None)
        if entry.ready is not None and link.session is not None and entry.ready.epoch == link.session.epoch:
            self._outbox.append((link.session, wire.Release(epoch=link.session.epoch, lease=entry.ready.lease)))
            self._kick()
        entry.ready = None

    # The I/O thread

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

    def _kick(self) -> None:
        """Wake the I/O thread."""
        os.eventfd_write(self._wake, 1)

    def _run_io(self) -> None:
        try:
            while not self._closing.is_set():
                poller = zmq.Poller()
                poller.register(self._wake, zmq.POLLIN)
                with self.lock:
                    up = [(link, link.session, link.monitor) for link in self.links if link.session]
                    patience = min((link.renew_at for link, _, _ in up), default=time.monotonic() + 1.0)
                for _, session, monitor in up:
                    poller.register(session.socket, zmq.POLLIN)
                    poller.register(monitor, zmq.POLLIN)
                events = dict(poller.poll(max(0, int((patience - time.monotonic()) * 1000) + 1)))
                if self._wake in events:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._wake)
                for link, session, monitor in up:
                    if session.socket in events:
                        self._read(link, session)
                    if monitor in events and link.session is session:
                        assert monitor is not None
                        recv_monitor_message(monitor)
                        with self.lock:
                            self._lose(link, "its connection is gone")
                with self.lock:
                    self._renew()
                    self._pump()
        finally:
            with self.lock:
                for link in self.links:
                    if link.session is not None:
                        with contextlib.suppress(zmq.ZMQError):
                            link.session.socket.send(wire.encode(wire.Bye(epoch=link.session.epoch)), zmq.NOBLOCK)
                        self._fetcher.retire(link.hang_up("the subscriber is closed"))

    def _read(self, link: Link, session: Session) -> None:
        """Act on all that a daemon has sent."""
        while link.session is session:
            try:
                message = wire.decode(session.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            with self.lock:
                link.heard = time.monotonic()
                self._act(link, message)
                self.lock.notify_all()

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
                self.artifacts.arrived(message)
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
        entry.ready, entry.state = message, State.READY
        if entry.dropped:
            self._let_go(entry)
            return
        self._stats.forward_s += message.target_us / 1e6
        self._fetcher.fetch(entry, link.session)

    def _renew(self) -> None:
        """Keep leases alive; a daemon that has not answered for half their life is lost."""
        now = time.monotonic()
        for link in self.links:
            session = link.session
            if session is None:
                continue
            ttl_s = session.welcome.lease_ttl_ms / 1000
            if now - link.heard > ttl_s / 2:
                self._lose(link, f"it has not answered for {now - link.heard:.1f} s")
            elif now >= link.renew_at:
                link.renew_at = now + ttl_s / RENEWALS_PER_TTL
                self._outbox.append((session, wire.Renew(epoch=session.epoch)))

    def _pump(self) -> None:
        """Submit pending entries in order to whoever has most room, then send all that is due."""
        for entry in self._entries:
            if entry.state is not State.PENDING or entry.error is not None:
                continue
            link = max(self.links, key=lambda link: link.room)
            if link.session is None or link.room <= 0:
                break
            entry.link, entry.state = link, State.SUBMITTED
            entry.attempts += 1
            link.entries[entry.seq] = entry
            submit = wire.Submit(
                epoch=link.session.epoch,
                seq=entry.seq,
                batch_id=entry.identity,
                tokens=entry.batch.tokens.astype("<i4", copy=False).tobytes(),
                lengths=entry.batch.lengths.astype("<i4", copy=False).tobytes(),
            )
            self._outbox.append((link.session, submit))
        while self._outbox:
            session, message = self._outbox.popleft()
            for owner in [link for link in self.links if link.session is session]:
                try:
                    session.socket.send(wire.encode(message), zmq.NOBLOCK)
                except zmq.Again:  # an embedded daemon that has ended
                    self._lose(owner, "its connection is gone")

    def _begin_fetch(self, entry: Entry, session: Session) -> SlotRef | None:
        with self.lock:
            ready, link = entry.ready, entry.link
            if entry.state is not State.READY or ready is None or link is None or link.session is not session:
                return None
            entry.state, entry.began = State.FETCHING, time.monotonic()
            if session.needs_recv_ready:
                self._outbox.append((session, wire.RecvReady(epoch=session.epoch, lease=ready.lease)))
                self._kick()
            return SlotRef(ready.slot, ready.generation, entry.layout.nbytes)

    def _end_fetch(self, entry: Entry, session: Session, buffer: torch.Tensor | None, problem: str) -> None:
        with self.lock:
            self._stats.fetch_s += time.monotonic() - entry.began
            if buffer is None:
                log.warning("%s: %s is fetched again: %s", session.endpoint, entry, problem)
                self._retry(entry, problem)
            else:
                self._let_go(entry)
                entry.buffer, entry.state = buffer, State.FETCHED
            self._kick()
            self.lock.notify_all()
