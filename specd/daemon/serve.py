"""Running a daemon: in the foreground for `specd start`, or inside a trainer's own process for a co-located run."""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import zmq

from specd.config.settings import DaemonConfig, SubscriberConfig
from specd.daemon.control import Control
from specd.daemon.front import raise_file_limit
from specd.daemon.lock import owned
from specd.daemon.supervisor import ProcessHandle, Supervisor, ThreadHandle
from specd.endpoints import interface, resolve_endpoint
from specd.memory import cuda, segment
from specd.protocol.messages import StatusReport
from specd.transports.base import ServerContext
from specd.transports.registry import WITHIN_PROCESS

log = logging.getLogger(__name__)

Context = zmq.Context[zmq.Socket[bytes]]


class Embedded(NamedTuple):
    """A daemon inside this process. endpoint, context: what a Subscriber needs to reach it."""

    endpoint: str
    context: Context

    def subscriber_config(self, **settings: Any) -> SubscriberConfig:
        """Settings of a Subscriber that connects to this daemon; `settings` override the defaults."""
        return SubscriberConfig(endpoints=(self.endpoint,), transport=WITHIN_PROCESS, **settings)


def serve(settings: DaemonConfig, on_ready: Callable[[StatusReport], None]) -> None:
    """Run a daemon until SIGINT ends it at once or SIGTERM has drained it. Call it from the main thread.

    on_ready: called once, when batches can be submitted. Raises DaemonError when another daemon owns the endpoint, or
    no worker can be started; ConfigError for an endpoint, or a page of metrics, that may not be opened.
    """
    endpoint = resolve_endpoint(settings.endpoint)
    host = interface(endpoint, settings.insecure, keyed=settings.auth is not None)
    raise_file_limit(settings.ring.max_sessions)
    with owned(endpoint) as pipes, zmq.Context() as context:
        segment.sweep()
        # Transports bind beside the daemon's own sockets, and on the interface it listens on itself.
        serving = ServerContext(directory=str(pipes.parent), host=host, curve=settings.auth is not None)
        supervisor = Supervisor(settings, ProcessHandle, f"ipc://{pipes}", serving, context)
        control = Control(settings, (endpoint,), supervisor, context, on_ready)
        # A signal that lands while libzmq is about to sleep must still end that sleep.
        wakeup = signal.set_wakeup_fd(control.ending.wake_fd, warn_on_full_buffer=False)
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            signal.signal(signal.SIGINT, lambda *_: control.ending.stop())
            signal.signal(signal.SIGTERM, lambda *_: control.ending.drain())
            with _metrics(settings.metrics, control):
                control.run()
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)
            control.close()


def _metrics(address: str, control: Control) -> contextlib.AbstractContextManager[object]:
    """The page of metrics, if one is asked for."""
    if not address:
        return contextlib.nullcontext()
    from specd.daemon.exporter import exporting  # it takes a while to import

    return exporting(address, control.questions)


@contextlib.contextmanager
def embedded(settings: DaemonConfig, context: Context | None = None) -> Iterator[Embedded]:
    """A daemon on threads of this process, served over `inproc`; yields once its target is loaded.

    context: to share with other embedded daemons, so that one Subscriber reaches them all.
    Raises DaemonError with the reason when the target cannot be loaded.
    """
    # The worker's thread starts on the first device, whichever the caller made its own.
    target = msgspec.structs.replace(settings.target, device=cuda.resolve(settings.target.device))
    settings = msgspec.structs.replace(settings, target=target, transports=(WITHIN_PROCESS,))
    endpoint = f"inproc://specd-{secrets.token_hex(8)}"
    ready = threading.Event()
    failure: list[Exception] = []
    with zmq.Context() if context is None else contextlib.nullcontext(context) as context:
        supervisor = Supervisor(
            settings, lambda worker: ThreadHandle(worker, context), endpoint, ServerContext(), context
        )
        control = Control(settings, (endpoint,), supervisor, context, lambda status: ready.set())

        def run() -> None:
            try:
                control.run()
            except Exception as error:
                if ready.is_set():  # the trainer only sees that it does not answer
                    log.exception("the daemon ended")
                failure.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run, name="specd-control", daemon=True)
        thread.start()
        try:
            ready.wait()
            if failure:
                raise failure[0]
            with _metrics(settings.metrics, control):
                yield Embedded(endpoint, context)
        finally:
            if thread.is_alive():
                control.ending.stop()
            thread.join()
            control.close()
