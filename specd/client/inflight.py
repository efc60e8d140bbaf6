"""The batches in flight: a window under one lock, and the threads that carry out what it wants done.

    training loop: submit, take, give_back, drop ─┐            ┌─▶ SocketLoop: messages               (specd-io)
    specd-connect: opened ────────────────────────┼─▶ Window ──┤
    specd-io: act ────────────────────────────────┤   effects  └─▶ Fetcher: transfers, buffers, views (specd-fetch)
    specd-fetch: begin, end, returned ────────────┘

Each thread tells the window what happened, and carries out the effects that it returns before another thread may tell
it something; `give_back` alone frees the lock in between, and no other effect depends on its own. Apart from that the
training loop only waits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import msgspec
import torch
import zmq

from specd.client import effects
from specd.client.artifacts import ArtifactReader
from specd.client.changed import Changed
from specd.client.connect import Connector
from specd.client.effects import Effect
from specd.client.fetch import Fetcher, Item
from specd.client.guard import Guard
from specd.client.handshake import Session, Terms
from specd.client.interrupt import Interrupt
from specd.client.io import GONE, Closed, Lost, SocketLoop
from specd.client.links import Link, Links
from specd.client.peers import Keeping, Peers
from specd.client.pending import State
from specd.client.seats import Role
from specd.client.window import Window
from specd.config.settings import SubscriberConfig
from specd.endpoints import resolve_endpoint
from specd.errors import DaemonError, ProtocolError, RejectedError, TransportError
from specd.memory.streams import Point, reached
from specd.metrics import Stats
from specd.protocol import messages as wire
from specd.protocol.contract import RingInfo
from specd.protocol.messages import Message
from specd.transports.base import SlotRef

log = logging.getLogger(__name__)

TICK_S = 0.25
"""Longest the training loop waits before it looks for what is late."""


class InFlight:
    """Brings submitted batches home over any number of daemons, whatever dies on the way.

    roles: of the endpoints. keeping: which daemons may keep states over epochs. Everything public is called from one
    thread, the training loop's.
    """

    def __init__(
        self,
        config: SubscriberConfig,
        terms: Terms,
        context: zmq.Context[zmq.Socket[bytes]],
        roles: Sequence[Role] = (),
        keeping: Keeping = "anywhere",
    ) -> None:
        self._config = config
        self._device = terms.device
        self._wider_told = not config.share
        """Whether it was said that slots of the share hold more than this run reads."""
        self._stats = Stats()
        self._lock = Changed()
        self._guard = Guard(self._lock)
        self._links = Links([resolve_endpoint(endpoint) for endpoint in config.endpoints], roles)
        standby = [self._links.index(link) for link in self._links if link.role.standby]
        daemons = [link.endpoint for link in self._links]
        self._window: Window[Session, torch.Tensor] = Window(Peers(daemons, standby, keeping), time.monotonic)
        self.artifacts = ArtifactReader(self._lock, config.timeout_s, self._ask)
        self._closing = Interrupt()
        self._connector = Connector(context, terms, self._opened, self._closing, self._guard)
        self._fetcher = Fetcher(terms.device, config.depth + 2, self._begin, self._end, self._guard)
        self._io = SocketLoop(self._links, self._lock, self._act, self._guard)
        with self._lock:
            self._dial()

    def __len__(self) -> int:
        """How many batches are still to be taken."""
        return len(self._window)

    def __str__(self) -> str:
        return f"{self._links.num_up} of {len(self._links)} daemons up, {len(self)} batches in flight"

    # For the subscriber

    def first_session(self) -> Session:
        """The first session that is up; waits for it. Raises what keeps all of them from opening."""
        with self._lock:
            while (session := self._links.session) is None:
                self._check()
                self._lock.wait(0.5)
            return session

    def rings(self) -> dict[str, RingInfo]:
        """Of all daemons that are up, by endpoint; empty while one that may bring batches is not."""
        with self._lock:
            if any(link.session is None and not link.role.standby for link in self._links):
                return {}
            return {link.endpoint: link.session.welcome.ring for link in self._links if link.session is not None}

    def tell_epoch(self, batches: int) -> None:
        """Tell all daemons how many batches an epoch has."""
        with self._lock:
            self._io.tell_epoch(batches)

    def submit(self, batches: Iterable[Item]) -> None:
        """Have batches captured; they come home by `take`, in this order."""
        with self._lock:
            self._carry_out(self._window.add(batches))

    def take(self) -> Item:
        """Wait for the oldest batch and charge the time to whom it waited for. Raises what keeps it from coming."""
        limit = time.monotonic() + self._config.timeout_s
        with self._lock:
            while not self._window.here():
                self._check()
                if self._links.session is None and self._links.loading:  # the batch is not late before it is asked for
                    limit = time.monotonic() + self._config.timeout_s
                self._carry_out(self._window.tick())
                self._wait_for(self._window.first, limit)
            self._guard.check()
            pending = self._window.first
            self._carry_out(self._window.take())
            self._stats.batches += 1
            self._stats.tokens += pending.batch.num_tokens
            self._stats.nbytes += pending.layout.nbytes
            self._stats.fetch_s += pending.fetch_s
            self._stats.forward_s += pending.forward_s
            self._stats.shared += pending.source in ("joined", "kept")
            self._stats.replayed += pending.source == "replay"
        return pending

    def give_back(self, pending: Item) -> None:
        """Take a batch back, once the calling thread's current stream has done what it was told so far.

        Idempotent; `close` does it too.
        """
        with self._lock:
            todo = self._window.give_back(pending)
        if todo:
            after = reached(self._device)  # without the lock: a full launch queue makes it wait
            with self._lock:
                self._carry_out(todo, after)

    def drop(self) -> None:
        """Give up everything in flight."""
        with self._lock:
            self._carry_out(self._window.drop())

    def stats(self) -> Stats:
        """Counters since the start."""
        with self._lock:
            transports = {link.endpoint: link.session.choice.name for link in self._links if link.session}
            return msgspec.structs.replace(self._stats, resubmitted=self._window.resubmitted, transports=transports)

    def close(self) -> None:
        """End every session and thread; transfers in flight are given a moment. Idempotent."""
        if self._closing.is_set():
            return
        for pending in self._window.in_use:
            self._guard(self.give_back, pending)
        self.drop()
        self._closing.set()
        self._fetcher.stop()  # while there are sessions that a borrowed slot can be released in
        self._io.stop()
        self._fetcher.close()
        self._connector.join()
        self._io.close()

    # Waiting, on the training loop's thread

    def _wait_for(self, pending: Item, limit: float) -> None:
        begin = time.monotonic()
        if begin > limit:
            raise DaemonError(
                f"{pending} of {pending.layout.nbytes} bytes did not come within {self._config.timeout_s:g} s "
                f"(subscriber.timeout_s): it {pending.state.value} and was submitted {pending.submissions} times"
                f"{f', last {pending.problem}' if pending.problem else ''}; {self._links.problems()}"
            )
        on_wire = pending.state in (State.READY, State.FETCHING)
        self._lock.wait(min(TICK_S, limit - begin))
        waited = time.monotonic() - begin
        self._stats.wire_wait_s += waited * on_wire
        self._stats.target_wait_s += waited * (not on_wire)

    def _check(self) -> None:
        """Raise what ends the run: an error of a thread, or no daemon for too long that is not loading its worker."""
        self._guard.check()
        self._dial()
        down = time.monotonic() - self._links.down_since
        if down > self._config.connect_s and self._links.session is None and not self._links.loading:
            raise DaemonError(
                f"no daemon for {down:.0f} s (subscriber.connect_s): {self._links.problems()}. Start one with "
                f"`specd start --model MODEL`, or name its --endpoint"
            )

    def _dial(self) -> None:
        """Look for a session wherever one is wanted and nobody does. With the lock."""
        for link in self._links.to_dial():
            link.dialled = True
            self._connector.connect(link)

    def _ask(self, messages: Callable[[bytes], list[Message]], asked: Session | None) -> Session | None:
        """Send messages over the first session that is up, unless the one asked already is; returns the one asked."""
        self._check()
        if asked is not None and self._links.of(asked) is not None:
            return asked
        session = self._links.session
        if session is not None:
            for message in messages(session.epoch):
                self._io.post(session, message)
        return session

    # Effects

    def _carry_out(self, todo: Iterable[Effect[Session, torch.Tensor]], after: Point | None = None) -> None:
        """Do what the window wants done. after: when the training stream has read what is given back. With the lock."""
        for effect in todo:
            match effect:
                case effects.SendSubmit(session, pending, late, keep):
                    if late:
                        log.warning("%s is asked for %s too: no answer for %.1f s", session.endpoint, pending, late)
                    self._io.post(session, pending.request(session.epoch, keep=keep))
                case effects.SendRelease(session, lease):
                    self._io.post(session, wire.Release(epoch=session.epoch, lease=lease))
                case effects.SendRecvReady(session, lease):
                    self._say(session, wire.RecvReady(epoch=session.epoch, lease=lease))
                case effects.SendBorrow(session, lease):
                    self._say(session, wire.Borrow(epoch=session.epoch, lease=lease))
                case effects.Abandon(session, reason):
                    self._io.abandon(session, reason)
                case effects.Cancel(session, reason):
                    log.warning("%s: %s", session.endpoint, reason)
                    session.client.cancel()
                case effects.FetchSlot(session, pending):
                    self._fetcher.fetch(pending, session)
                case effects.Missed(session, pending, reason):
                    log.warning("%s: %s did not arrive: %s", session.endpoint, pending, reason)
                case effects.Unborrow(session):
                    self._fetcher.unborrow(session)
                case effects.Recycle(buffer):
                    self._fetcher.recycle(buffer, after)
                case effects.Return(session, ref, pending):
                    self._fetcher.give_back(session, ref, after, partial(self._returned, pending))

    def _say(self, session: Session, message: Message) -> None:
        """Send a message before the next effect. On the I/O loop's thread."""
        self._io.post(session, message)
        for link in self._io.flush():
            self._lose(link, GONE)

    # What connector, I/O loop and fetcher tell

    def _opened(self, link: Link, session: Session) -> bool:
        with self._lock:
            if self._closing.is_set() or self._io.ended:
                return False
            if link.role.standby and self._links.near:
                link.dialled = False
                return False
            if (first := self._links.session) is not None:  # two may have been met at the same moment
                one, other = (each.welcome.contract.fingerprint for each in (first, session))
                if one != other:
                    served = (
                        f"{session.endpoint} serves target {other}, {first.endpoint} serves {one}: "
                        f"expected one target; name only daemons that host the same"
                    )
                    self._guard.fail(RejectedError(served))
                    return False
            link.open(session)
            kept = session.welcome.replay
            if kept is not None and kept.encoding not in ("raw", session.spec.dtype):
                log.info("%s keeps states as %s: those that it reads are rounded", link.endpoint, kept.encoding)
            if not link.role.standby:
                self._send_off()
            self._io.wake()
            self._stats.num_slots = session.welcome.ring.num_slots
            self._carry_out(
                self._window.opened(
                    self._links.index(link),
                    session,
                    session.welcome.credits,
                    session.welcome.ring.slot_bytes,
                    session.welcome.ring.payload_bytes,
                    borrow=session.borrow,
                    announce=session.needs_recv_ready,
                    keeps=kept is not None and kept.cells > 0,
                )
            )
            self._lock.notify_all()
        return True

    def _send_off(self) -> None:
        """End the sessions with daemons that stand by: one of the rank's own is up."""
        for link in self._links:
            if link.role.standby and link.session is not None:
                self._io.abandon(link.session, "a daemon that is this rank's own is up again")

    def _act(self, link: Link, event: Message | Lost | Closed) -> None:
        session = link.session
        assert session is not None
        match event:
            case wire.Ready():
                self._stats.busy_slots = event.busy_slots
                if not self._wider_told and event.held is not None and event.held != session.spec:
                    self._wider_told = True
                    share, wide, own = self._config.share, event.held.title, session.spec.title
                    log.info("%s: share %s captures %s, this run reads %s", link.endpoint, share, wide, own)
                self._carry_out(self._window.ready(session, event))
            case wire.Failed() if not event.retry:
                self._carry_out(self._window.failed(session, event.seq, event.reason))
            case wire.Failed() | wire.Revoke() | Lost():
                self._lose(link, event.reason)
            case wire.Artifact():
                self.artifacts.arrived(event, link.endpoint)
            case wire.Renewed():
                pass
            case Closed():
                self._fetcher.retire(link.hang_up(event.reason))
            case wire.Error():
                raise ProtocolError(f"{link.endpoint} refused a message: {event.reason}")
            case _:
                raise ProtocolError(f"{link.endpoint} sent {type(event).__name__}, which a trainer does not expect")
        self._lock.notify_all()

    def _lose(self, link: Link, reason: str) -> None:
        """Hang up a session that is over, retry its batches, and open it anew; one that stands by only when needed."""
        left = link.role.standby and self._links.near
        level, word = (logging.INFO, "left") if left else (logging.WARNING, "lost")
        log.log(level, "%s %s: %s", word, link.endpoint, reason)
        session = self._links.hang_up(link, reason)
        self._fetcher.retire(session)
        self._stats.reconnects += not left
        self._carry_out(self._window.lost(session, reason))
        link.dialled = False
        if not link.role.standby:
            self._dial()

    def _begin(self, pending: Item, session: Session) -> SlotRef | None:
        with self._lock:
            return None if self._closing.is_set() else self._window.begin(pending, session)

    def _end(self, pending: Item, got: torch.Tensor | TransportError, took_s: float) -> None:
        with self._lock:
            if isinstance(got, TransportError):
                todo = self._window.missed(pending, str(got), took_s, lost=got.lost)
            else:
                todo = self._window.fetched(pending, got, took_s)
            self._carry_out(todo)
            self._lock.notify_all()

    def _returned(self, pending: Item, problem: TransportError | None) -> None:
        with self._lock:
            self._carry_out(self._window.returned(pending))
        if problem is not None:
            log.error("%s was overwritten while it was borrowed: %s", pending, problem)
            self._guard.fail(TransportError(f"{pending} was overwritten while it was borrowed: {problem}"))
