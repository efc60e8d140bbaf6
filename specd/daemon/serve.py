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

import msgspec
import zmq

from specd.config.settings import DaemonConfig, check_private, make_runtime_dir, resolve_endpoint, runtime_dir
from specd.daemon.control import Control
from specd.daemon.supervisor import ProcessHandle, Supervisor, ThreadHandle
from specd.errors import ConfigError, DaemonError
from specd.memory import arena, cuda
from specd.protocol.messages import StatusReport
from specd.transports.base import ServerContext
from specd.transports.bytes import socket as bulk

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
    host = _interface(endpoint, settings.insecure)
    with _owned(endpoint) as pipes, zmq.Context() as context:
        arena.sweep()
        bulk.sweep(str(pipes.parent))
        # Transports bind beside the daemon's own sockets, and on the interface it listens on itself.
        serving = ServerContext(directory=str(pipes.parent), host=host)
        supervisor = Supervisor(settings, ProcessHandle, f"ipc://{pipes}", serving, context)
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
            except Exception as error:
                if ready.is_set():  # whoever trains will only hear that nobody answers
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
            yield Embedded(endpoint, context)
        finally:
            if thread.is_alive():
                control.stop()
            thread.join()
            control.close()


def _interface(endpoint: str, insecure: bool) -> str:
    """What a tcp endpoint listens on: an address, without brackets, or a name; empty for other endpoints.

    Raises ConfigError for one that strangers may connect to, unless they are allowed to, or that serves no trainer.
    """
    if not endpoint.startswith("tcp://"):
        return ""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]")
    address = bulk.address(host)
    if address is not None and address.is_unspecified:
        raise ConfigError(
            f"endpoint {endpoint} listens on every interface, and a trainer must be told one address to take batches "
            f"from: name the one it can reach, as in tcp://192.0.2.7:{port}, with --insecure on a network you trust"
        )
    loopback = host == "localhost" or (address is not None and address.is_loopback)
    if not loopback and not insecure:
        raise ConfigError(
            f"endpoint {endpoint} can be reached from other machines, and the protocol neither encrypts nor asks who "
            f"they are: pass --insecure if you trust that network, or use this machine's address in a VPN (WireGuard) "
            f"with --insecure; trainers on this machine need no tcp endpoint"
        )
    return host


@contextlib.contextmanager
def _owned(endpoint: str) -> Iterator[Path]:
    """Own an endpoint; yields the path prefix of the daemon's own sockets.

    libzmq takes over a live ipc endpoint without a word, so a lock file beside it decides.
    """
    if endpoint.startswith("ipc://"):
        prefix = Path(endpoint.removeprefix("ipc://"))
        if prefix.parent == runtime_dir():
            make_runtime_dir()
        elif not prefix.parent.is_dir():
            raise ConfigError(f"endpoint {endpoint}: its directory does not exist; create it with mode 700")
    else:
        prefix = make_runtime_dir() / endpoint.rpartition(":")[2]
    if (length := len(os.fsencode(prefix))) > MAX_PREFIX:
        raise ConfigError(
            f"endpoint {endpoint}: its path {prefix} has {length} bytes, at most {MAX_PREFIX} leave room for the "
            f"daemon's own sockets beside it; choose a shorter one, or a shorter XDG_RUNTIME_DIR"
        )
    check_private(prefix.parent)
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
