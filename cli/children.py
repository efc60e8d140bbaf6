"""Commands of specd as processes of their own, which never outlive the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from specd.errors import DaemonError
from specd.memory import segment
from specd.train.interrupt import Interrupt

SETTLE_S = 20.0
"""Timeout of a child's orderly end; then it is killed."""


class Children:
    """Commands under way. A context manager for the main thread.

    Each has its own process group and a signal that ends it at once. If this process is killed, the kernel kills them.
    """

    __slots__ = ("_interrupt", "_running")

    def __init__(self, interrupt: Interrupt) -> None:
        self._interrupt = interrupt
        self._running: list[tuple[subprocess.Popen[bytes], signal.Signals]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{len(self._running)} processes"

    @property
    def running(self) -> bool:
        """Whether one of them is not over yet."""
        return any(child.poll() is None for child, _ in self._running)

    def start(
        self,
        arguments: Sequence[str],
        end: signal.Signals,
        *,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start `specd ARGUMENTS`. end: the signal that ends it in order."""
        command = [sys.executable, "-P", "-m", "specd.cli.child", str(os.getpid()), *arguments]
        # A signal must not come between the birth of a child and its entry in the list that is cleaned up.
        with self._interrupt.shield():
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )
            self._running.append((child, end))
        return child

    def forget(self, child: subprocess.Popen[bytes]) -> None:
        """Leave a child that is over alone."""
        self._running = [entry for entry in self._running if entry[0] is not child]

    def end(self, which: Sequence[subprocess.Popen[bytes]], settle_s: float = SETTLE_S) -> bool:
        """End some, all at once: by their signals, then by SIGKILL after `settle_s`; whether that was needed."""
        killed = False
        for child, number in self._running:
            if child in which:
                child.send_signal(number)
        limit = time.monotonic() + settle_s
        for child in which:
            try:
                child.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                killed = True
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # the rest of its group
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
            self.forget(child)
        if killed:
            segment.sweep()
        return killed

    def close(self) -> None:
        """End all, the youngest first. Idempotent."""
        while self._running:
            self.end([self._running[-1][0]])


def ready(daemon: subprocess.Popen[bytes], log: Path) -> str:
    """The line that a `specd start` prints to a pipe once it serves. log: of its errors.

    Raises DaemonError with what it said last, when it ends before that.
    """
    assert daemon.stdout is not None, "asked for a pipe"
    if line := daemon.stdout.readline().decode().rstrip():
        return line
    daemon.wait()
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raise DaemonError(f"the daemon did not start: {said[-1] if said else 'it said nothing'} (its log is {log})")
