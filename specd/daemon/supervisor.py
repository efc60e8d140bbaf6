"""The supervisor: starts the worker, notices its death, and starts the next one after a back-off.

A worker is a process of its own or, in a co-located run, a thread; control sees the same pipes and the same death.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import zmq

from specd.config.settings import DaemonConfig
from specd.errors import DaemonError
from specd.memory import segment
from specd.protocol.limits import EPOCH_BYTES
from specd.transports.base import ServerContext
from specd.worker import messages as channel
from specd.worker.worker import Worker, WorkerConfig

log = logging.getLogger(__name__)

BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Back-off before the nth consecutive restart; a worker that fills a batch resets it."""
LOADS = 10
"""A daemon without a worker is no loss for its trainers until it took this many times its last load time, or longer."""
LEAST_LOAD_S = 600.0
MAX_EARLY_DEATHS = 3
"""The daemon gives up after this many worker deaths if none ever served."""
STOP_S = 10.0


class Handle(Protocol):
    """One running worker. fd: becomes readable when it is dead."""

    fd: int
    pid: int

    def reap(self) -> str:
        """How it died, once `fd` is readable."""
        ...

    def kill(self) -> None:
        """Kill it, if it can be."""

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended within `timeout_s`."""
        ...

    def close(self) -> None:
        """Close `fd`."""


Launch = Callable[[WorkerConfig], Handle]


class Supervisor:
    """Keeps one worker alive. epoch: of the current life, or of the last one while none runs. killed: by `kill`.

    pipes: prefix of the endpoints of the two pipes, such as `ipc:///run/…/default` or `inproc://…`.
    """

    def __init__(
        self,
        settings: DaemonConfig,
        launch: Launch,
        pipes: str,
        serving: ServerContext,
        context: zmq.Context[zmq.Socket[bytes]],
    ) -> None:
        self._settings = settings
        self._launch = launch
        self._pipes = pipes
        self._serving = serving
        self._context = context
        self._handle: Handle | None = None
        self._poller: zmq.Poller | None = None
        self._to: zmq.Socket[bytes] | None = None
        self._from: zmq.Socket[bytes] | None = None
        self._deaths = 0
        self._load_s = 0.0
        self._down_since = time.monotonic()
        self._why = ""
        self.killed = False
        self._due: float | None = time.monotonic()
        self._up = False
        self._ever_served = False
        self.epoch = secrets.token_bytes(EPOCH_BYTES)

    @property
    def worker_pid(self) -> int:
        """Process id of the worker, 0 while none runs."""
        return self._handle.pid if self._handle else 0

    def next_start(self) -> float | None:
        """When the next worker is due, in monotonic seconds; None while one runs."""
        return self._due

    def tend(self, poller: zmq.Poller) -> None:
        """Start a worker if one is due, and register its pipe and its death with `poller`.

        Raises DaemonError as `restart` does.
        """
        if self._due is None or self._due > time.monotonic():
            return
        self._due = None
        self.epoch = secrets.token_bytes(EPOCH_BYTES)
        self._poller = poller
        try:
            self._start(poller)
        except (OSError, zmq.ZMQError) as error:  # such as no memory for a process: retry later
            self.restart(f"it could not be launched: {error}")

    def _start(self, poller: zmq.Poller) -> None:
        inbox, outbox = (f"{self._pipes}.{self.epoch.hex()[:8]}.{end}" for end in ("in", "out"))
        self._to, self._from = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        for socket, endpoint in ((self._to, inbox), (self._from, outbox)):
            socket.set(zmq.SNDHWM, 0)
            socket.set(zmq.RCVHWM, 0)
            # Before bind: libzmq ends the connection of a peer that died with the linger of that moment, and with the
            # default one it may wait for ever.
            socket.set(zmq.LINGER, 0)
            socket.bind(endpoint)
        self._handle = self._launch(
            WorkerConfig(daemon=self._settings, epoch=self.epoch, inbox=inbox, outbox=outbox, serving=self._serving)
        )
        poller.register(self._from, zmq.POLLIN)
        poller.register(self._handle.fd, zmq.POLLIN)

    def notes(self, events: dict[Any, int]) -> list[Any]:
        """The worker's messages."""
        notes: list[Any] = []
        if self._from is not None and self._from in events:
            with contextlib.suppress(zmq.Again):
                while True:
                    notes.append(channel.decode(self._from.recv(zmq.NOBLOCK)))
        return notes

    def send(self, note: channel.ToWorker) -> None:
        """Send to the worker; a no-op while none serves."""
        if self._to is not None and self._up:
            with contextlib.suppress(zmq.Again):  # it is dead, but not yet reaped
                self._to.send(channel.encode(note), zmq.NOBLOCK)

    def serving(self, load_s: float) -> None:
        """Note that the worker is up, after so many seconds."""
        self._up = self._ever_served = True
        self._load_s = load_s

    def loading_s(self) -> float:
        """The longest that the next worker may take from now, in seconds; 0 while one serves, or it is overdue."""
        if self._up:
            return 0.0
        return max(0.0, self._down_since + max(LEAST_LOAD_S, LOADS * self._load_s) - time.monotonic())

    def productive(self) -> None:
        """Reset the back-off: the worker filled a batch."""
        self._deaths = 0

    def failed(self, reason: str) -> None:
        """Kill a worker that reported that it cannot start. Raises DaemonError if none ever did."""
        if not self._ever_served:
            raise DaemonError(reason)
        self.kill(f"it cannot start again: {reason}")

    def kill(self, reason: str) -> None:
        """Kill the worker, if it can be. reason: told when it is dead."""
        self.killed, self._why = True, reason
        if self._handle is not None:
            log.error("the worker is killed: %s", reason)
            self._handle.kill()

    def death(self, events: dict[Any, int]) -> str | None:
        """How the worker died, if it did."""
        if self._handle is None or self._handle.fd not in events:
            return None
        how = self._handle.reap()
        return self._why or how

    def restart(self, reason: str) -> None:
        """Clean up after a dead worker and set the time of the next start.

        Raises DaemonError after MAX_EARLY_DEATHS deaths before any worker served.
        """
        self._deaths += 1
        if self._up:
            self._down_since = time.monotonic()
        self._clear()
        if not self._ever_served and self._deaths >= MAX_EARLY_DEATHS:
            raise DaemonError(f"the worker died {self._deaths} times before it served: {reason}; see its log above")
        pause = BACKOFF_S[min(self._deaths, len(BACKOFF_S)) - 1]
        self._due = time.monotonic() + pause
        log.warning("the worker died (%s); the next one starts in %.1f s", reason, pause)

    def stop(self) -> None:
        """Stop the worker, or kill it after STOP_S. Idempotent."""
        handle, self._due = self._handle, None
        if handle is not None:
            assert self._to is not None
            with contextlib.suppress(zmq.Again):
                self._to.send(channel.encode(channel.Stop()), zmq.NOBLOCK)
            if not self._up:
                handle.kill()  # it may load for minutes
            if not handle.wait(STOP_S):
                log.warning("the worker did not stop within %.0f s", STOP_S)
                handle.kill()
                handle.wait(STOP_S)
        self._clear()

    def _clear(self) -> None:
        """Drop the worker, its pipes and its segment."""
        if self._poller is None:  # none was ever started
            return
        if self._handle is not None:
            self._poller.unregister(self._handle.fd)
            self._handle.close()
        for socket in (self._to, self._from):
            if socket is not None:
                if socket in self._poller:
                    self._poller.unregister(socket)
                socket.close()
        self._handle = self._to = self._from = None
        self._up = self.killed = False
        self._why = ""
        segment.remove(self.epoch.hex())


class ProcessHandle:
    """A worker process. It ends when its parent does, and does not get the terminal's Ctrl-C."""

    def __init__(self, worker: WorkerConfig) -> None:
        worker = msgspec.structs.replace(worker, parent_pid=os.getpid())
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "specd.worker.worker"], stdin=subprocess.PIPE, start_new_session=True
        )
        self.pid = self._process.pid
        self.fd = os.pidfd_open(self.pid)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(msgspec.json.encode(worker) + b"\n")

    def reap(self) -> str:
        code = self._process.wait()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout_s: float) -> bool:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        os.close(self.fd)


class ThreadHandle:
    """A worker thread of this process. It cannot be killed."""

    pid = 0

    def __init__(self, worker: WorkerConfig, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.fd = os.eventfd(0)
        self._reason = "it returned"
        life = Worker(worker, context)
        self._thread = threading.Thread(target=self._run, args=(life,), name="specd-worker", daemon=True)
        self._thread.start()

    def _run(self, worker: Worker) -> None:
        try:
            worker.run()
        except Exception as error:
            log.exception("the worker thread died")
            self._reason = repr(error)
        finally:
            os.eventfd_write(self.fd, 1)

    def reap(self) -> str:
        self._thread.join()
        return self._reason

    def kill(self) -> None:
        """A thread cannot be killed: it ends when it hears Stop, or cannot start."""

    def wait(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Close `fd`, unless the thread still runs: it writes to it at its end."""
        if not self._thread.is_alive():
            os.close(self.fd)
