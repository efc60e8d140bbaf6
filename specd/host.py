"""Running a daemon: in the foreground for `specd start`, or inside a trainer's own process for a co-located run."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
import zmq

from specd import arena, cuda
from specd.config import DaemonConfig, resolve_endpoint, runtime_dir
from specd.daemon import Control
from specd.errors import ConfigError, DaemonError
from specd.protocol import StatusReport
from specd.supervisor import ProcessHandle, Supervisor, ThreadHandle
from specd.transport import ServerContext
from specd.transports import bulk

log = logging.getLogger(__name__)

Context = zmq.Context[zmq.Socket[bytes]]
MAX_PREFIX = 107 - len(".01234567.out")
"""Bytes of a path that still give socket paths, 107 bytes at most, when the workers' pipes are named after it."""


class Embedded(NamedTuple):
    """A daemon inside this process. endpoint, context: what a Subscriber needs to reach it."""

    endpoint: str
    context: Context


def serve(settings: DaemonConfig, on_ready: Callable[[StatusReport], None]) -> None:
    """Run a daemon until SIGINT ends it at once or SIGTERM has drained it. Call it from the main thread.

    on_ready: called once, when batches can be submitted. Raises DaemonError when another daemon owns the endpoint, or
    no worker can be started; ConfigError for an endpoint that may not be opened.
    """
    endpoint = resolve_endpoint(settings.endpoint)
    _check_exposure(endpoint, settings.insecure)
    with _owned(endpoint) as pipes, zmq.Context() as context:
        arena.sweep()
        bulk.sweep(str(pipes.parent))
        supervisor = Supervisor(settings, ProcessHandle, f"ipc://{pipes}", _serving(endpoint, pipes), context)
        control = Control(settings, (endpoint,), supervisor, context, on_ready)
        # A signal that lands while libzmq is about to sleep must still end that sleep.
        wakeup = signal.set_wakeup_fd(control.wake_fd, warn_on_full_buffer=False)
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            signal.signal(signal.SIGINT, lambda *_: control.stop())
            signal.signal(signal.SIGTERM, lambda *_: control.drain())
            control.run()
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)
            control.close()


@contextlib.contextmanager
def embedded(settings: DaemonConfig, context: Context | None = None) -> Iterator[Embedded]:
    """A daemon on threads of this process, served over `inproc`; yields once its target is loaded.

    context: to share with other embedded daemons, so that one Subscriber reaches them all.
    Raises DaemonError with the reason when the target cannot be loaded.
    """
    # The worker's thread starts on the first device, whichever the caller made its own.
    target = msgspec.structs.replace(settings.target, device=cuda.resolve(settings.target.device))
    settings = msgspec.structs.replace(settings, target=target, transports=("inproc",))
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
            except Exception as error:  # noqa: BLE001 (raised again on the caller's thread)
                failure.append(error)
            finally:
                ready.set()

        thread = threading.Thread(target=run, name="specd-control", daemon=True)
        thread.start()
        try:
            ready.wait()
            if failure:
                raise failure[0]
            yield Embedded(endpoint, context)
        finally:
            if thread.is_alive():
                control.stop()
            thread.join()
            control.close()


def _check_exposure(endpoint: str, insecure: bool) -> None:
    """Refuse to listen where strangers may connect, unless told to."""
    host = urlsplit(endpoint).hostname
    if endpoint.startswith("tcp://") and host not in {"127.0.0.1", "localhost", "::1"} and not insecure:
        raise ConfigError(
            f"endpoint {endpoint} can be reached from other machines and the protocol is not encrypted: "
            f"listen on tcp://127.0.0.1:PORT and tunnel to it, or pass --insecure on a network you trust"
        )


@contextlib.contextmanager
def _owned(endpoint: str) -> Iterator[Path]:
    """Own an endpoint; yields the path prefix of the daemon's own sockets.

    libzmq takes over a live ipc endpoint without a word, so a lock file beside it decides.
    """
    own_dir = runtime_dir()
    own_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    if endpoint.startswith("ipc://"):
        socket = Path(endpoint.removeprefix("ipc://"))
        if not socket.parent.is_dir():
            raise ConfigError(f"endpoint {endpoint}: its directory does not exist; create it with mode 700")
        prefix = socket
        if (length := len(os.fsencode(prefix))) > MAX_PREFIX:
            raise ConfigError(
                f"endpoint {endpoint}: its path has {length} bytes, at most {MAX_PREFIX} leave room for the daemon's "
                f"own sockets beside it; choose a shorter one"
            )
    else:
        socket, prefix = None, own_dir / endpoint.rpartition(":")[2]
    facts = prefix.parent.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ConfigError(
            f"directory {prefix.parent} has mode {facts.st_mode & 0o777:o} and owner {facts.st_uid}: the daemon's "
            f"sockets need one of mode 700 that is yours"
        )
    lock = os.open(f"{prefix}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise DaemonError(
            f"a daemon already owns {endpoint}: use it, stop it with `specd stop --endpoint {endpoint}`, or start this "
            f"one on another --endpoint"
        ) from None
    try:
        _clear_sockets(prefix)
        yield prefix
    finally:
        _clear_sockets(prefix)
        os.close(lock)


def _clear_sockets(prefix: Path) -> None:
    """Remove the sockets of a daemon that is gone: its endpoint, its workers' pipes."""
    for path in (prefix, *prefix.parent.glob(f"{glob.escape(prefix.name)}.*")):
        if path.is_socket():
            path.unlink(missing_ok=True)


def _serving(endpoint: str, prefix: Path) -> ServerContext:
    """Where transports may bind: beside the daemon's own sockets, and on the interface it listens on itself."""
    host = urlsplit(endpoint).hostname if endpoint.startswith("tcp://") else None
    return ServerContext(directory=str(prefix.parent), host=host or "")
