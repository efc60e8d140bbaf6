"""Control: owns the sockets, sessions, leases and credits of one daemon, and keeps its worker alive.

One thread, one poll loop, no torch. It never waits for a forward, a transfer or a trainer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import zmq
from msgspec.structs import replace

from specd.config.settings import DaemonConfig
from specd.daemon.account import Account
from specd.daemon.admission import Unfit, admit_batch, admit_probe, check_attach, check_fetch, check_hello
from specd.daemon.connections import Connection
from specd.daemon.dispatch import Dispatch, Fill
from specd.daemon.ending import Ending
from specd.daemon.front import Front
from specd.daemon.lag import LagWindow
from specd.daemon.questions import Questions
from specd.daemon.reads import Reads
from specd.daemon.report import status_report, welcome
from specd.daemon.ring import Ring
from specd.daemon.sessions import Sessions, TrainerSession
from specd.daemon.slots import Lease
from specd.daemon.supervisor import Supervisor
from specd.errors import ProtocolError
from specd.protocol import limits
from specd.protocol import messages as wire
from specd.protocol.messages import Message
from specd.worker import messages as channel

log = logging.getLogger(__name__)

RETRY_MS = 300
"""Retry delay sent with a REJECT that may succeed later."""


class Control:
    """The control loop of one daemon.

    endpoints: what to bind, ipc, tcp or inproc. supervisor: starts workers. on_ready: called once with the status when
    the first worker serves. ending: asks it to end. questions: asks what it is doing. Raises DaemonError from `run`
    when no worker can be started.
    """

    def __init__(
        self,
        settings: DaemonConfig,
        endpoints: tuple[str, ...],
        supervisor: Supervisor,
        context: zmq.Context[zmq.Socket[bytes]],
        on_ready: Callable[[wire.StatusReport], None] = lambda status: None,
    ) -> None:
        self._settings = settings
        self._supervisor = supervisor
        self._on_ready = on_ready
        self._clock = time.monotonic
        ring = settings.ring
        always = settings.capture.always.spec
        self._ring = Ring(ring.slots, ring.max_sessions, ring.lease_ttl_s, self._clock, ring.pace_s, always)
        self._dispatch: Dispatch[channel.FillSlot] = Dispatch(settings.hang_s, self._clock)
        self._started: channel.Started | None = None
        self._reads = Reads()
        self._served = False
        self._account = Account(self._clock)
        self.counters = self._account.counters
        self._poller = zmq.Poller()
        self._sessions = Sessions(self._poller, self._ring)
        self._front = Front(settings, endpoints, context, self._clock)
        self.endpoints = self._front.endpoints
        self.ending, self.questions = Ending(), Questions()
        for fd in (self.ending.fd, self.questions.fd):
            self._poller.register(fd, zmq.POLLIN)
        self._front.register(self._poller)

    # The loop

    def run(self) -> None:
        """Serve until stopped or drained."""
        try:
            while not self.ending.stopping:
                self._supervisor.tend(self._poller)
                events = dict(self._poller.poll(self._patience_ms()))
                self.ending.seen()
                self._listen()
                for connection in self._front.lost():
                    for key in self._sessions.over(connection):
                        self._end(key, "its connection is gone")
                for connection in self._front.refused():
                    for key in self._sessions.over(connection):
                        self._end(key, "its key is not let in any more")
                for key in self._sessions.dead(events):
                    self._end(key, "the trainer's process ended")
                self._sessions.release_dead(events)
                for note in self._supervisor.notes(events):
                    self._hear(note)
                if (hung_at := self._hung_at()) is not None and hung_at <= self._clock():
                    self._supervisor.kill(f"it hung: no batch within {self._dispatch.limit_s:.0f} s")
                if (death := self._supervisor.death(events)) is not None:
                    self._lose_worker(death)
                for key in self._ring.expire():
                    self._end(key, "its lease expired", expired=True)
                self.counters.add("idle_connections", self._front.tidy(self._sessions.connections()))
                self._schedule()
                self._account.turn(
                    up=self._started is not None, filling=self._dispatch.busy, queued=self._ring.queued() > 0
                )
                self.questions.answer(events, self.status)
                if self.ending.draining and not any(self._ring.outstanding(session.key) for session in self._sessions):
                    break
        finally:
            self._close()

    def _patience_ms(self) -> int:
        times = (
            self._front.next_deadline(),
            self._ring.next_deadline(),
            self._supervisor.next_start(),
            self._hung_at(),
        )
        return max(0, int((min(at for at in times if at is not None) - self._clock()) * 1000) + 1)

    def close(self) -> None:
        """Close what other threads wake it by. Nothing may be asked after it."""
        self.ending.close()
        self.questions.close()

    def _close(self) -> None:
        for session in self._sessions:
            self._end(session.key, "the daemon ended", tell=True)
        self._sessions.reset()
        # Before the worker, which may take a while: nobody hears who comes and goes any more.
        self._front.close()
        self._supervisor.stop()

    # Trainers

    def _listen(self) -> None:
        """Handle what trainers sent."""
        for key, connection, frames in self._front.messages():
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"a message has {len(frames)} frames, expected 1")
                self._handle(key, connection, wire.decode_request(frames[0].buffer))
            except ProtocolError as error:
                self.counters.add("refused_messages")
                self._send(key, wire.Error(epoch=self._epoch, reason=str(error)[: limits.MAX_REASON_CHARS]))

    def _handle(self, key: bytes, connection: Connection | None, message: Any) -> None:
        """Handle one message; a ProtocolError is answered with ERROR and changes nothing."""
        match message:
            case wire.Status():
                self._send(key, self.status())
                return
            case wire.Hello():
                self._send(key, self._greet(key, connection, message))
                return
        session = self._sessions.get(key)
        if session is None or session.connection is not connection or message.epoch != self._epoch:
            if not isinstance(message, wire.Bye):
                self._send(key, wire.Revoke(epoch=self._epoch, reason="no session in this epoch: say HELLO"))
            return
        match message:
            case wire.Submit() | wire.Probe():
                self._submit(session, message)
            case wire.Borrow():
                self._ring.borrow(key, message.lease)
            case wire.Release():
                lease = self._ring.lease(key, message.lease)
                if self._ring.release(key, message.lease) and lease is not None:
                    session.requests.pop(lease.seq, None)
            case wire.RecvReady():
                self._publish(session, message)
            case wire.Renew():
                self._ring.renew(key)
                if message.epoch_batches not in (0, session.epoch_batches):
                    session.epoch_batches = message.epoch_batches
                    self._tell_epochs()
                self._send(key, wire.Renewed(epoch=self._epoch))
            case wire.Attach():
                self._attach(session, message)
            case wire.Fetch():
                self._fetch(session, message)
            case wire.Bye():
                self._end(key, "")

    def _greet(self, key: bytes, connection: Connection | None, hello: wire.Hello) -> wire.Welcome | wire.Reject:
        """Open a session, or REJECT with a reason."""
        if key in self._sessions:
            self._end(key, "")
        started = self._started
        if started is None or self.ending.draining:
            reason = f"the daemon is {'draining' if self.ending.draining else 'starting its worker'}"
            return wire.Reject(epoch=self._epoch, reason=reason, retry_ms=RETRY_MS, loading_ms=self._loading_ms())
        stranger, many = self._front.stranger(connection), self._front.too_many(connection, hello.ranks)
        wanted = self._ring.shares.wanted(hello.share, hello.spec.dtype)
        exact = self._settings.target.exact
        if problem := stranger or many or check_hello(hello, started.contract, started.ring, wanted, exact=exact):
            return wire.Reject(epoch=self._epoch, reason=problem)
        over = self._front.over_quota(connection, self._sessions.connections())
        session = over or self._sessions.open(key, hello, connection, self._clock())
        if isinstance(session, str):
            return wire.Reject(epoch=self._epoch, reason=session, retry_ms=RETRY_MS)
        self._tell_epochs()
        return welcome(session, self._ring, self._supervisor, started, self._settings.ring.lease_ttl_s)

    def _loading_ms(self) -> int:
        return 0 if self.ending.draining else round(self._supervisor.loading_s() * 1000)

    def _end(self, key: bytes, reason: str, *, expired: bool = False, tell: bool = False) -> None:
        """Close a session and free all it holds. reason: for the log, empty for an orderly end."""
        session = self._sessions.pop(key)
        if session is None:
            return
        self._reads.drop(key)
        self._supervisor.send(channel.Drop(session=key))
        if reason:
            log.info("session %s is over: %s", session, reason)
        if expired or tell:
            self.counters.add("revoked_sessions")
            self._send(key, wire.Revoke(epoch=self._epoch, reason=reason))

    def _send(self, key: bytes, message: Message) -> None:
        """Send to one trainer, never blocking; if it is gone or does not read, its session ends."""
        if problem := self._front.send(key, message):
            self._end(key, problem)

    # Batches

    def _submit(self, session: TrainerSession, message: wire.Submit | wire.Probe) -> None:
        assert self._started is not None
        contract, ring = self._started.contract, self._started.ring
        self._ring.check(session.key, message.seq)  # before the content is looked at, which takes a while
        try:
            if self.ending.draining:
                raise Unfit("the daemon is draining")
            if isinstance(message, wire.Probe):
                request = admit_probe(message, session.key, ring)
            else:
                request = admit_batch(message, session.spec, contract, ring, shared=bool(session.share))
            if (poison := self._dispatch.poison(request.batch_id)) is not None:
                raise Unfit(poison)
        except Unfit as error:
            identity = message.batch_id if isinstance(message, wire.Submit) else bytes(limits.BATCH_ID_BYTES)
            self._fail(session.key, message.seq, identity, str(error), retry=self.ending.draining)
            return
        cuts = session.cuts(self._started.cutting)
        self._ring.submit(session.key, message.seq, request.batch_id, request.want, place=request.place, cuts=cuts)
        session.requests[message.seq] = request

    def _schedule(self) -> None:
        """Give free slots to waiting requests, and tell the worker what to fill and to read."""
        for save in self._ring.contents.saves():
            self._supervisor.send(channel.SaveSlot(**save._asdict()))
        plan = self._ring.schedule()
        for grant in plan.fills:
            session = self._sessions.get(grant.holder)
            assert session is not None, "nothing was sent since it was scheduled"
            task = session.requests[grant.seq].task(grant)
            if isinstance(task, channel.FillSlot):
                self._dispatch.add(Fill(grant.slot, grant.generation, grant.batch_id, task))
            else:
                self._supervisor.send(task)
        for fill in self._dispatch.next():
            self._supervisor.send(fill.task)
        for read in self._reads.next():
            self._supervisor.send(read)
        for lease in plan.ready:
            self._announce(lease, 0)

    def _announce(self, lease: Lease, target_us: int, *, replayed: bool = False) -> None:
        session = self._sessions.get(lease.holder)
        if session is None:  # it was lost while its other leases were announced
            return
        request = session.requests[lease.seq]
        layout = request.layout
        if layout.tensors:  # a probe is no batch
            session.served(layout)
            self._account.served(layout)
            self._supervisor.productive()
        ready = request.ready(lease, self._epoch, self._ring.busy, target_us, replayed=replayed)
        self._send(lease.holder, ready)

    def _fail(self, key: bytes, seq: int, identity: bytes, reason: str, *, retry: bool) -> None:
        self.counters.add("failed")
        reason = reason[: limits.MAX_REASON_CHARS]
        self._send(key, wire.Failed(epoch=self._epoch, seq=seq, batch_id=identity, reason=reason, retry=retry))

    def _publish(self, session: TrainerSession, message: wire.RecvReady) -> None:
        lease = self._ring.lease(session.key, message.lease)
        if lease is None or not session.transport:
            raise ProtocolError(f"lease {message.lease} cannot be received: expected a READY lease and a transport")
        self._ring.renew(session.key)
        ref = session.requests[lease.seq].ref(lease)
        self._supervisor.send(channel.Publish(session=session.key, transport=session.transport, ref=ref))

    def _attach(self, session: TrainerSession, message: wire.Attach) -> None:
        assert self._started is not None
        if reason := check_attach(message.transport, session.share, self._started):
            self._send(session.key, wire.Refuse(epoch=self._epoch, transport=message.transport, reason=reason))
            return
        self._supervisor.send(channel.Accept(session=session.key, transport=message.transport, hello=message.hello))

    def _fetch(self, session: TrainerSession, message: wire.Fetch) -> None:
        assert self._started is not None
        check_fetch(message, self._started.contract, self._reads.of(session.key))
        self._reads.add(
            channel.ReadArtifact(session=session.key, name=message.name, offset=message.offset, length=message.length)
        )

    # The worker

    @property
    def _epoch(self) -> bytes:
        return self._supervisor.epoch

    def _hear(self, note: channel.ToControl) -> None:
        """Handle one message of the worker."""
        match note:
            case channel.Started():
                self._started = note
                self._supervisor.serving(note.load_s)
                self._dispatch.started(note.load_s)
                self._ring.contents.lag = LagWindow(note.lag_cells)
                log.info("worker serves %s after %.1f s", note.contract.model, note.load_s)
                if not self._served:
                    self._served = True
                    self._on_ready(self.status())
            case channel.StartFailed():
                self._supervisor.failed(note.reason)
            case channel.Filled():
                self.counters.add("forward_us", note.target_us)
                self._dispatch.done(note.slot, note.generation)
                forward_s = None if note.replayed else note.target_us / 1e6
                for lease in self._ring.filled(note.slot, note.generation, forward_s):
                    self._announce(lease, note.target_us, replayed=note.replayed)
            case channel.Saved():
                self._ring.contents.lag.saved(note.number, note.ok)
            case channel.ReplayCounts():
                self._account.replay(note.counts)
                if (started := self._started) is not None and started.replay is not None:
                    now = replace(started.replay, cells=note.cells, used=note.used, failed=note.failed)
                    self._started = replace(started, replay=now)
            case channel.FillFailed():
                self._dispatch.done(note.slot, note.generation)
                for lease in self._ring.failed(note.slot, note.generation):
                    if (session := self._sessions.get(lease.holder)) is not None:
                        session.requests.pop(lease.seq, None)
                    self._fail(lease.holder, lease.seq, lease.batch_id, note.reason, retry=False)
            case channel.Accepted():
                if (session := self._sessions.get(note.session)) is not None:
                    session.transport = note.transport
                self._send(note.session, wire.Offer(epoch=self._epoch, transport=note.transport, offer=note.offer))
            case channel.Refused():
                reason = note.reason[: limits.MAX_REASON_CHARS]
                self._send(note.session, wire.Refuse(epoch=self._epoch, transport=note.transport, reason=reason))
            case channel.ArtifactBytes():
                self._reads.done(note.session)
                data = wire.Artifact(epoch=self._epoch, name=note.name, offset=note.offset, data=note.data)
                self._send(note.session, data)

    def _tell_epochs(self) -> None:
        """Tell a worker that keeps states how long one is of use that nobody asks for."""
        if self._started is not None and (replay := self._started.replay) is not None:
            self._supervisor.send(channel.Lasts(lookups=self._sessions.lookups(4 * replay.cells)))

    def _hung_at(self) -> float | None:
        """When the worker is to be killed unless it reports before."""
        return None if self._supervisor.killed else self._dispatch.hung_at()

    def _lose_worker(self, reason: str) -> None:
        """Drop all state of the dead worker, REVOKE every session, and schedule a restart."""
        self._started = None
        self._dispatch.died()
        self._reads.died()
        self.counters.add("worker_restarts")
        for session in self._sessions:
            self._end(session.key, f"the worker died ({reason})", tell=True)
        self._sessions.reset()
        self._supervisor.restart(reason)

    def status(self) -> wire.StatusReport:
        """What `specd status` shows."""
        return status_report(
            self._account,
            self._ring,
            self._sessions,
            self._supervisor,
            self.ending,
            self.endpoints,
            self._started,
            self._loading_ms(),
        )
