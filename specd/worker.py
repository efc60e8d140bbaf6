"""The worker: owns the target, the ring's memory and the transports' serving sides.

Three threads. The service thread talks with control and with the transports; the target thread loads the target and
launches forwards; the announcer thread waits for those that run on a device, and copies their slots to the host while
a trainer reads there. A slot is announced only when its bytes are in place.
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
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import zmq

from specd import channel
from specd.arena import HostArena
from specd.capture import CaptureSpec
from specd.config import DaemonConfig
from specd.device import DeviceArena
from specd.errors import SpecdError, TransportError
from specd.packing import slot_bytes
from specd.protocol import RingInfo, TargetContract
from specd.targets import load_target
from specd.targets.base import Completion, Fill, Target
from specd.transport import DEVICE_ORDER, HOST_ORDER, Server, ServerContext, Transport, load, pattern

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

Announce = Callable[[zmq.Socket[bytes]], None]
Task = channel.FillSlot | channel.FillNoise

RDMA_DEVICES = "/sys/class/infiniband"


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What control tells a new worker: its configuration, its epoch, its two pipes, and who its parent is."""

    daemon: DaemonConfig
    epoch: bytes
    inbox: str
    outbox: str
    serving: ServerContext
    parent_pid: int = 0


class Worker:
    """One life of the target. `run` blocks until control says Stop, or its parent is dead."""

    def __init__(self, config: WorkerConfig, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._config = config
        self._context = context
        self._target: Target | None = None
        self._arena: HostArena | DeviceArena | None = None
        self._servers: dict[str, Server] = {}
        self._host_side: set[str] = set()  # what is served from the host, of a ring on a device
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._announcements: queue.SimpleQueue[tuple[Completion, Announce] | None] = queue.SimpleQueue()
        self._announcer: threading.Thread | None = None
        self._ahead = threading.Semaphore(1)
        """Forwards that may be launched behind one that runs: what comes meanwhile then shares the next."""
        self._crashed = os.eventfd(0)

    def run(self) -> None:
        """Serve until told to stop."""
        inbox = self._context.socket(zmq.PULL)
        inbox.set(zmq.RCVHWM, 0)
        inbox.connect(self._config.inbox)
        outbox = self._outbox()
        thread = threading.Thread(target=self._run_target, name="specd-target", daemon=True)
        thread.start()
        parent = os.pidfd_open(self._config.parent_pid) if self._config.parent_pid else -1
        try:
            poller = zmq.Poller()
            poller.register(inbox, zmq.POLLIN)
            poller.register(self._crashed, zmq.POLLIN)
            if parent >= 0:
                poller.register(parent, zmq.POLLIN)
            while True:
                ready = dict(poller.poll())
                if parent in ready:
                    log.warning("control is gone: the worker ends")
                    self._abandon()
                if self._crashed in ready:
                    raise RuntimeError("the target failed")
                if inbox in ready and not self._serve(channel.decode(inbox.recv()), outbox):
                    break
        finally:
            self._tasks.put(None)
            thread.join()
            try:
                self._close()
            finally:
                for socket in (inbox, outbox):
                    socket.close(linger=1000)
                for fd in (parent, self._crashed):
                    if fd >= 0:
                        os.close(fd)

    def _outbox(self) -> zmq.Socket[bytes]:
        """A pipe to control; each thread that reports has its own."""
        socket = self._context.socket(zmq.PUSH)
        socket.set(zmq.SNDHWM, 0)
        socket.connect(self._config.outbox)
        return socket

    def _serve(self, note: channel.ToWorker, outbox: zmq.Socket[bytes]) -> bool:
        """Do what control asks, on the service thread; False ends the worker."""
        match note:
            case channel.FillSlot() | channel.FillNoise():
                self._tasks.put(note)
            case channel.Publish():
                try:
                    self._servers[note.transport].publish(note.session, note.ref)
                except TransportError as error:  # the session ended meanwhile; its trainer's deadline notices
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
            case channel.Stop():
                return False
        return True

    def _accept(self, note: channel.Accept) -> channel.Accepted | channel.Refused:
        try:
            # Before the trainer can ask for a slot, all that are in the ring must lie where it reads.
            self._read_on_host(note.session, note.transport in self._host_side)
            offer = self._servers[note.transport].accept(note.session, note.hello)
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
            except (SpecdError, MemoryError) as error:
                log.debug("worker start failed", exc_info=True)
                outbox.send(channel.encode(channel.StartFailed(reason=str(error) or repr(error))))
                return
            outbox.send(channel.encode(started))
            held: Task | None = None
            while (first := held or self._tasks.get()) is not None:
                group, held = self._gather(first)
                self._fill(group, outbox)
        except BaseException:
            log.exception("the target thread crashed")
            os.eventfd_write(self._crashed, 1)
        finally:
            if self._announcer is not None:
                self._announcements.put(None)
                self._announcer.join()
            outbox.close(linger=1000)

    def _start(self) -> channel.Started:
        config = self._config.daemon
        begin = time.monotonic()
        self._target = target = load_target(config.target)
        contract = target.contract
        nbytes = slot_bytes(capture_of(config, contract), contract.hidden_size, config.ring.slot_tokens)
        path = self._open_ring(nbytes)
        return channel.Started(
            contract=contract,
            ring=RingInfo(num_slots=config.ring.slots, slot_bytes=nbytes, slot_tokens=config.ring.slot_tokens),
            transports=tuple(self._servers),
            segment=path,
            load_s=time.monotonic() - begin,
        )

    def _open_ring(self, nbytes: int) -> str:
        """Make the ring where the target computes, and serve it; returns the path of its segment, empty if private.

        A transport that was named must work; of those that `auto` stands for, the ones that do not are left out.
        """
        assert self._target is not None
        config, device = self._config.daemon, self._target.device
        automatic = _candidates(device) if "auto" in config.transports else ()
        found: dict[str, type[Transport]] = {}
        for name in dict.fromkeys([*automatic, *(name for name in config.transports if name != "auto")]):
            try:
                found[name] = _usable(name, device)
            except TransportError as error:
                self._leave_out(name, error)
        shared = self._config.epoch.hex() if any(one.traits.scope == "host" for one in found.values()) else None
        arena: HostArena | DeviceArena
        if device == "cpu":
            self._arena = arena = HostArena.create(config.ring.slots, nbytes, shared)
        else:
            self._host_side = {name for name, one in found.items() if "device" not in one.traits.memory}
            mirrored = bool(self._host_side)
            self._arena = arena = DeviceArena.create(config.ring.slots, nbytes, device, shared, mirrored)
        for name, transport in found.items():
            here = arena.ledger if isinstance(arena, DeviceArena) and name in self._host_side else arena
            try:
                self._servers[name] = transport.server(here, self._config.serving)
            except TransportError as error:
                self._leave_out(name, error)
        if not self._servers:
            raise TransportError(f"no transport can serve a ring on {device}; the log says why, at level INFO")
        return arena.path

    def _leave_out(self, name: str, error: TransportError) -> None:
        """Go on without a transport that only `auto` asked for; raise the error of one that was named."""
        if name in self._config.daemon.transports:
            raise TransportError(f"transport {name!r} cannot be served: {error}") from error
        log.info("%s is not served: %s", name, error)

    def _gather(self, first: Task) -> tuple[list[Task], Task | None]:
        """`first` and the waiting batches that may share its forward; and one that may not, to start the next group."""
        group = [first]
        target = self._config.daemon.target
        if isinstance(first, channel.FillNoise) or target.exact:
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
            if (
                isinstance(task, channel.FillNoise)
                or task.spec != first.spec
                or num_bytes + len(task.tokens) > 4 * target.max_forward_tokens
            ):
                return group, task
            num_bytes += len(task.tokens)
            group.append(task)

    def _fill(self, group: Sequence[Task], outbox: zmq.Socket[bytes]) -> None:
        """Fill the slots of one group with one forward, then announce them."""
        assert self._arena is not None
        assert self._target is not None
        arena, fills = self._arena, []
        for task in group:
            arena.begin(task.slot)
            if isinstance(task, channel.FillNoise):
                arena.write(task.slot, pattern(task.nonce, task.nbytes))
            else:
                slot = arena.tensor(task.slot) if isinstance(arena, DeviceArena) else arena.slot(task.slot)
                tokens, lengths = np.frombuffer(task.tokens, "<i4"), np.frombuffer(task.lengths, "<i4")
                fills.append(Fill(tokens=tokens, lengths=lengths, spec=task.spec, layout=task.layout, slot=slot))
        sizes = [len(task.tokens) if isinstance(task, channel.FillSlot) else 1 for task in group]
        begin = time.monotonic()
        try:
            completion = self._target.run(fills) if fills else None
        except SpecdError as error:
            if len(group) > 1:  # so that a bad batch fails alone
                for task in group:
                    self._fill([task], outbox)
                return
            failed = channel.FillFailed(slot=group[0].slot, generation=group[0].generation, reason=str(error))
            outbox.send(channel.encode(failed))
            return

        def announce(pipe: zmq.Socket[bytes]) -> None:
            micros = (time.monotonic() - begin) * 1e6 / sum(sizes)
            for task, size in zip(group, sizes, strict=True):
                nbytes = task.layout.nbytes if isinstance(task, channel.FillSlot) else task.nbytes
                arena.seal(task.slot, task.generation, nbytes)
                share = round(micros * size)
                pipe.send(channel.encode(channel.Filled(slot=task.slot, generation=task.generation, target_us=share)))

        if completion is None:
            announce(outbox)
        else:
            self._announce_later(completion, announce)

    def _announce_later(self, completion: Completion, announce: Announce) -> None:
        """Hand a pending completion to the announcer thread, so that the next forward is launched meanwhile.

        Returns when no other forward is unfinished.
        """
        if self._announcer is None:
            self._announcer = threading.Thread(target=self._run_announcer, name="specd-announcer", daemon=True)
            self._announcer.start()
        self._announcements.put((completion, announce))
        self._ahead.acquire()

    def _run_announcer(self) -> None:
        outbox = self._outbox()
        try:
            while (item := self._announcements.get()) is not None:
                completion, announce = item
                completion.wait()
                self._ahead.release()
                announce(outbox)
        except BaseException:
            log.exception("a forward failed on the device")
            os.eventfd_write(self._crashed, 1)
            self._ahead.release(1 + self._config.daemon.ring.slots)  # nothing that is queued waits for it any more
        finally:
            outbox.close(linger=1000)

    def _abandon(self) -> None:
        """End this process now, without waiting for a forward; shared memory does not outlive it."""
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


def capture_of(config: DaemonConfig, contract: TargetContract) -> CaptureSpec:
    """The spec the daemon's slots are sized for; which taps does not matter, only how many."""
    capture = config.capture
    dtype = contract.dtype if capture.dtype == "auto" else capture.dtype
    return CaptureSpec(taps=tuple(range(capture.num_taps)), final=capture.final, dtype=dtype)  # type: ignore[arg-type]


def _candidates(device: str) -> tuple[str, ...]:
    """What `auto` serves of a ring on `device`."""
    if device == "cpu":
        return HOST_ORDER
    rdma = os.path.isdir(RDMA_DEVICES) and os.listdir(RDMA_DEVICES)
    return tuple(name for name in DEVICE_ORDER if name != "nixl" or rdma)


def _usable(name: str, device: str) -> type[Transport]:
    """The transport called `name`, if it can take a ring on `device`. Raises TransportError."""
    transport = load(name)
    if device == "cpu" and "host" not in transport.traits.memory:
        raise TransportError("it moves device memory, and the ring lies where the target computes, on the CPU")
    return transport


def main() -> None:
    """Entry of a worker process: its WorkerConfig is one JSON line on standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches control, which ends its worker in order
    line = sys.stdin.buffer.readline()
    level = os.environ.get("SPECD_LOG", "WARNING")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s worker %(name)s: %(message)s")
    with zmq.Context() as context:
        Worker(msgspec.json.decode(line, type=WorkerConfig), context).run()


if __name__ == "__main__":
    main()
