"""`specd stop`: let a daemon finish its outstanding requests and end, and wait until it has."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from specd.endpoints import resolve_endpoint
from specd.errors import DaemonError

EXAMPLES = "Examples: `specd stop` · `specd stop --timeout 60 --force`"
GRACE_S = 5.0
"""Timeout between SIGINT and SIGKILL with --force."""


def stop(
    endpoint: Annotated[str, typer.Option("--endpoint", "-e", help="The daemon's endpoint.")] = "auto",
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for it to drain.")] = 30.0,
    force: Annotated[bool, typer.Option("--force", help="End it at once if it has not drained by then.")] = False,
) -> None:
    """Drain a daemon of this host and wait until it has ended."""
    from specd.client.ask import ask_status, waitable

    deadline = time.monotonic() + waitable(timeout)
    where = resolve_endpoint(endpoint)
    report = ask_status(endpoint, min(5.0, timeout))
    if not where.startswith("ipc://"):
        raise DaemonError(
            f"the daemon at {where} may be on another host, where process ids mean something else: expected an ipc "
            f"endpoint; send SIGTERM to process {report.pid} on its own host to drain it"
        )
    _check_listener(Path(where.removeprefix("ipc://")), report.pid)
    with _watched({pid for pid in (report.pid, report.worker_pid) if pid > 0}) as pidfds:
        _tell(pidfds, report.pid, signal.SIGTERM)
        gone = _ended(pidfds, deadline)
        if not gone and force:
            _tell(pidfds, report.pid, signal.SIGINT)
            gone = _ended(pidfds, time.monotonic() + GRACE_S)
            if not gone:
                for pid in pidfds:
                    _tell(pidfds, pid, signal.SIGKILL)
                gone = _ended(pidfds, time.monotonic() + GRACE_S)
    if not gone:
        remedy = "send it SIGKILL" if force else "--force ends it, and its trainers submit again to the next one"
        raise DaemonError(f"the daemon at {where} (pid {report.pid}) still runs after {timeout:g} s: {remedy}")
    typer.echo(f"the daemon at {where} has ended")


def _check_listener(path: Path, pid: int) -> None:
    """Raise DaemonError unless the process that listens at a socket, as the kernel has it, is this one."""
    credentials = struct.Struct("3i")
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            told, _, _ = credentials.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size))
    except OSError as error:
        raise DaemonError(f"the daemon at ipc://{path} is gone: {error.strerror}") from None
    if told != pid:
        who = f"process {told}" if told else "a process of another pid namespace"
        raise DaemonError(
            f"the daemon at ipc://{path} calls itself process {pid}, and {who} listens there: nothing was stopped; "
            f"where it runs in a container, stop it there"
        )


@contextlib.contextmanager
def _watched(pids: set[int]) -> Iterator[dict[int, int]]:
    """A pidfd for each live process, by pid: it becomes readable when the process ends."""
    pidfds: dict[int, int] = {}
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                pidfds[pid] = os.pidfd_open(pid)
        yield pidfds
    finally:
        for fd in pidfds.values():
            os.close(fd)


def _tell(pidfds: dict[int, int], pid: int, number: signal.Signals) -> None:
    if pid not in pidfds:
        return  # gone already
    try:
        signal.pidfd_send_signal(pidfds[pid], number)
    except ProcessLookupError:
        return
    except PermissionError:
        raise DaemonError(f"process {pid} belongs to another user: only that user can stop its daemon") from None


def _ended(pidfds: dict[int, int], deadline: float) -> bool:
    """Wait until all of these processes have ended; False at the deadline."""
    alive = set(pidfds.values())
    while alive:
        ready, _, _ = select.select(alive, [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        alive -= set(ready)
    return True
