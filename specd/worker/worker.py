"""The worker: owns the target, the ring's memory and the transports' serving sides.

Three threads. The service thread talks to control and the transports, and fills the slots of probes; the target thread
loads the target and launches forwards; the announcer thread waits for forwards on a device, and copies their slots to
the host while a trainer reads there. What is kept has threads of its own (`replaying.py`, `lag.py`). A slot is
announced only when its bytes are in place.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import zmq

from specd.config.settings import DaemonConfig
from specd.errors import ConfigError, SpecdError, TransportError, first_line
from specd.log import log_as
from specd.memory.arena import HostArena
from specd.memory.device_arena import DeviceArena
from specd.parent import when_parent_dies
from specd.protocol import payload
from specd.protocol.batch import slot_bytes
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import RingInfo, TargetContract
from specd.targets.base import CaptureJob, Target
from specd.targets.registry import load_target
from specd.transports import registry
from specd.transports.base import Server, ServerContext
from specd.transports.checks import pattern
from specd.worker import first_batches
from specd.worker import messages as channel
from specd.worker.announcer import Announcer
from specd.worker.blank import blank
from specd.worker.lag import LagCells
from specd.worker.replaying import Replay, identity_of
from specd.worker.ring_memory import open_ring

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

CRASH_S = 5.0
"""How long a failed worker waits for its target thread."""


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of a new worker: the daemon's, its epoch, its two pipes, its parent's pid (0: a thread)."""

    daemon: DaemonConfig
    epoch: bytes
    inbox: str
    outbox: str
    serving: ServerContext
    parent_pid: int = 0


class Worker:
    """One worker: loads the target and serves it. `run` blocks until Stop, or until its parent is dead."""

    def __init__(self, config: WorkerConfig, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._config = config
        self._context = context
        self._target: Target | None = None
        self._arena: HostArena | DeviceArena | None = None
        self._servers: dict[str, Server] = {}
        self._on_host: frozenset[str] = frozenset()
        self._tasks: queue.SimpleQueue[channel.FillSlot | None] = queue.SimpleQueue()
        self._announcer = Announcer(self._outbox, self._fail, 1 + config.daemon.ring.slots)
        self._replay: Replay | None = None
        self._lag: LagCells | None = None
        self._ended = os.eventfd(0)  # the target thread's: it could not start, or crashed
        self._failure = ""
        self._first = first_batches.FirstBatches()

    def run(self) -> None:
        """Serve until told to stop."""
        inbox = self._context.socket(zmq.PULL)
        inbox.set(zmq.RCVHWM, 0)
        inbox.connect(self._config.inbox)
        outbox = self._outbox()
        thread = threading.Thread(target=self._run_target, name="specd-target", daemon=True)
        thread.start()
        parent = os.pidfd_open(self._config.parent_pid) if self._config.parent_pid else -1
        patience: float | None = None
        try:
            poller = zmq.Poller()
            poller.register(inbox, zmq.POLLIN)
            poller.register(self._ended, zmq.POLLIN)
            if parent >= 0:
                poller.register(parent, zmq.POLLIN)
            while True:
                ready = dict(poller.poll())
                if parent in ready:
                    log.warning("control is gone: the worker ends")
                    self._abandon()
                if self._ended in ready:
                    if self._failure:
                        raise RuntimeError(self._failure)
                    break
                if inbox in ready and not self._serve(channel.decode(inbox.recv()), outbox):
                    break
        except BaseException:
            # The target may hang on a failed device. Only a process may leave it behind: a thread's ring is freed.
            patience = CRASH_S if parent >= 0 else None
            raise
        finally:
            self._tasks.put(None)
            thread.join(patience)
            if thread.is_alive():
                self._abandon()
            try:
                self._close()
            finally:
                for socket in (inbox, outbox):
                    socket.close(linger=1000)
                for fd in (parent, self._ended):
                    if fd >= 0:
                        os.close(fd)

    def _outbox(self) -> zmq.Socket[bytes]:
        """A pipe to control; each thread that reports has its own."""
        socket = self._context.socket(zmq.PUSH)
        socket.set(zmq.SNDHWM, 0)
        socket.connect(self._config.outbox)
        return socket

    def _serve(self, note: channel.ToWorker, outbox: zmq.Socket[bytes]) -> bool:
        """Handle one message of control, on the service thread; False ends the worker."""
        match note:
            case channel.FillSlot():
                if self._lag is not None:
                    self._lag.filling(note.slot, note.layout.nbytes)
                if self._replay is None or not self._replay.take(note):
                    self._tasks.put(note)
            case channel.FillNoise():
                assert self._arena is not None
                self._arena.begin(note.slot)
                self._arena.write(note.slot, pattern(note.nonce, note.nbytes))
                self._arena.seal(note.slot, note.generation, note.nbytes)
                outbox.send(channel.encode(channel.Filled(slot=note.slot, generation=note.generation, target_us=0)))
            case channel.Publish():
                try:
                    self._servers[note.transport].publish(note.session, note.ref)
                except TransportError as error:  # the session ended meanwhile; its trainer times out
                    log.info("%s is not sent: %s", note.ref, error)
            case channel.Accept():
                outbox.send(channel.encode(self._accept(note)))
            case channel.Drop():
                for server in self._servers.values():
                    server.drop(note.session)
                self._read_on_host(note.session, False)
            case channel.ReadArtifact():
                assert self._target is not None
                data = bytes(self._target.artifact(note.name)[note.offset : note.offset + note.length])
                reply = channel.ArtifactBytes(session=note.session, name=note.name, offset=note.offset, data=data)
                outbox.send(channel.encode(reply))
            case channel.SaveSlot() | channel.LoadSlot():
                assert self._lag is not None
                self._lag.copy(note)
            case channel.Lasts():
                assert self._replay is not None
                self._replay.lasts(note.lookups)
            case channel.Stop():
                return False
        return True

    def _accept(self, note: channel.Accept) -> channel.Accepted | channel.Refused:
        try:
            # Every slot of the ring must be readable there before the trainer can ask for one.
            self._read_on_host(note.session, note.transport in self._on_host)
            offer = self._servers[note.transport].accept(note.session, note.hello)
            for name, server in self._servers.items():
                if name != note.transport:  # an earlier attempt
                    server.drop(note.session)
        except SpecdError as error:
            self._read_on_host(note.session, False)
            return channel.Refused(session=note.session, transport=note.transport, reason=str(error))
        return channel.Accepted(session=note.session, transport=note.transport, offer=offer)

    def _read_on_host(self, session: bytes, wanted: bool) -> None:
        if isinstance(self._arena, DeviceArena):
            self._arena.read_on_host(session, wanted)

    def _run_target(self) -> None:
        """The target thread: load, then fill slots until told to stop."""
        outbox = self._outbox()
        try:
            try:
                started = self._start()
            except Exception as error:  # what a build raises once, it would raise at the next load, too
                known = isinstance(error, SpecdError | MemoryError)
                log.log(logging.DEBUG if known else logging.ERROR, "worker start failed", exc_info=True)
                reason = str(error) or repr(error)
                if not known:
                    reason = (
                        f"the target failed to start: {type(error).__name__}: {first_line(error)}; see its log above"
                    )
                outbox.send(channel.encode(channel.StartFailed(reason=reason)))
                if not self._config.parent_pid:  # a process waits to be killed, so that the reason arrives first
                    os.eventfd_write(self._ended, 1)
                return
            outbox.send(channel.encode(started))
            held: channel.FillSlot | None = None
            while (first := held or self._tasks.get()) is not None:
                group, held = self._gather(first)
                self._fill(group, outbox)
        except BaseException:
            log.exception("the target thread crashed")
            self._fail("the target failed")
        finally:
            self._announcer.close()
            outbox.close(linger=1000)

    def _start(self) -> channel.Started:
        config = self._config.daemon
        begin = time.monotonic()
        if problem := config.problem():
            raise ConfigError(problem)
        if config.replay.on:  # before the target is loaded, which takes long
            self._replay = Replay(config.replay, self._config.parent_pid or os.getpid())
        self._target = target = load_target(config.target)
        contract = target.contract
        always = config.capture.always.spec
        if always is not None and (problem := always.problem(contract.num_layers)):
            raise ConfigError(f"capture.always: {problem}")
        if config.ring.payload_mib and not contract.payloads:
            log.info("ring.payload_mib is not used: %s takes text alone here", contract.model)
        sized = capture_of(config, contract)
        nbytes = slot_bytes(sized, contract.hidden_size, config.ring.slot_tokens)
        self._arena, self._servers, self._on_host = open_ring(
            config, nbytes, target.device, self._config.epoch, self._config.serving
        )
        if config.ring.lag_gb:
            self._lag = LagCells(self._arena, config.ring.lag_gb, self._outbox, self._fail)
        replay = None
        if self._replay is not None:
            replay = self._replay.open(
                self._arena,
                identity_of(config.target, target, config.replay.encoding),
                contract.hidden_size,
                sized.dtype,
                self._outbox(),
                self._tasks.put,
                self._fail,
            )
        return channel.Started(
            contract=contract,
            ring=RingInfo(
                num_slots=config.ring.slots,
                slot_bytes=nbytes,
                slot_tokens=config.ring.slot_tokens,
                payload_bytes=config.ring.payload_mib << 20 if contract.payloads else 0,
            ),
            transports=tuple(self._servers),
            cutting=tuple(name for name in self._servers if registry.load(name).traits.cuts),
            segment=self._arena.path,
            load_s=time.monotonic() - begin,
            replay=replay,
            lag_cells=len(self._lag) if self._lag is not None else 0,
        )

    def _gather(self, first: channel.FillSlot) -> tuple[list[channel.FillSlot], channel.FillSlot | None]:
        """`first` and the queued batches that share its forward, and the one that does not: the next group's first."""
        group = [first]
        target = self._config.daemon.target
        if target.exact:
            return group, None
        num_bytes = len(first.tokens)
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                return group, None
            if task is None:
                self._tasks.put(None)
                return group, None
            if task.spec != first.spec or num_bytes + len(task.tokens) > 4 * target.max_forward_tokens:
                return group, task
            num_bytes += len(task.tokens)
            group.append(task)

    def _fill(self, group: Sequence[channel.FillSlot], outbox: zmq.Socket[bytes]) -> None:
        """Fill the slots of one group with one forward, then announce them."""
        assert self._arena is not None
        assert self._target is not None
        arena, fills = self._arena, []
        for task in group:
            arena.begin(task.slot)
            slot = arena.tensor(task.slot) if isinstance(arena, DeviceArena) else arena.slot(task.slot)
            blank(slot, task.layout)
            tokens, lengths = np.frombuffer(task.tokens, "<i4"), np.frombuffer(task.lengths, "<i4")
            payloads = tuple(map(payload.unpack, task.payloads))
            fills.append(
                CaptureJob(
                    tokens=tokens, lengths=lengths, spec=task.spec, layout=task.layout, slot=slot, payloads=payloads
                )
            )
        begin = time.monotonic()
        try:
            completion = self._target.run(fills)
        except SpecdError as error:
            if len(group) > 1:  # so that a bad batch fails alone
                for task in group:
                    self._fill([task], outbox)
                return
            failed = channel.FillFailed(slot=group[0].slot, generation=group[0].generation, reason=str(error))
            outbox.send(channel.encode(failed))
            return

        watched = [self._first.has(fill.spec) for fill in fills]

        def announce(pipe: zmq.Socket[bytes], took: float) -> None:
            micros = took * 1e6 / sum(len(task.tokens) for task in group)
            for task, fill, watch in zip(group, fills, watched, strict=True):
                if watch and (reason := first_batches.problem(fill)):
                    failed = channel.FillFailed(slot=task.slot, generation=task.generation, reason=reason)
                    pipe.send(channel.encode(failed))
                    continue
                arena.seal(task.slot, task.generation, task.layout.nbytes)
                share = round(micros * len(task.tokens))
                pipe.send(channel.encode(channel.Filled(slot=task.slot, generation=task.generation, target_us=share)))
                if self._replay is not None:
                    self._replay.offer(task)

        if completion is None:
            announce(outbox, time.monotonic() - begin)
        else:
            self._announcer.later(completion, begin, announce)

    def _fail(self, reason: str) -> None:
        """Have the service thread end this worker."""
        self._failure = reason
        os.eventfd_write(self._ended, 1)

    def _abandon(self) -> None:
        """Exit the process at once, not waiting for a forward; removes its shared segment."""
        if self._arena is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._arena.path)
        os._exit(1)

    def _close(self) -> None:
        with contextlib.ExitStack() as ends:  # the servers first, then what they serve
            if self._target is not None:
                ends.callback(self._target.close)
            if self._arena is not None:
                ends.callback(self._arena.close)
            for server in self._servers.values():
                ends.callback(server.close)
            if self._replay is not None:
                ends.callback(self._replay.close)
            if self._lag is not None:
                ends.callback(self._lag.close)


def capture_of(config: DaemonConfig, contract: TargetContract) -> CaptureSpec:
    """The spec the daemon's slots are sized for; only the number of taps matters."""
    capture = config.capture
    dtype = contract.dtype if capture.dtype == "auto" else capture.dtype
    num_taps, final = capture.sized_for
    return CaptureSpec(taps=tuple(range(num_taps)), final=final, dtype=dtype)  # type: ignore[arg-type]


def main() -> None:
    """Entry of a worker process: its WorkerConfig is one JSON line on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches control, which ends its worker in order
    line = sys.stdin.buffer.readline()
    log_as("worker")
    config = msgspec.json.decode(line, type=WorkerConfig)
    when_parent_dies(signal.SIGCONT)  # it sees that by itself, unless it is stopped
    with zmq.Context() as context:
        Worker(config, context).run()


if __name__ == "__main__":
    main()
