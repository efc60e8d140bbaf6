"""Ranks ≥ 1 of a tensor-parallel SGLang target: child processes that run every forward along with rank 0.

A rank gets its setup and then one Step per forward on standard input. It dies with its parent; the parent dies with
any of its ranks, because a collective with a missing rank never ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import threading
from typing import Final

import msgspec

from specd.targets.sglang.setup import RankSetup, Step

log = logging.getLogger(__name__)
STOP_S: Final = 10.0
"""Timeout of a rank's orderly end."""


class Ranks:
    """Processes of ranks 1…tp − 1 of a target, and their watcher. None for tp 1."""

    __slots__ = ("_children", "_closing", "_wake", "_watcher")

    def __init__(self, setup: RankSetup) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._closing = False
        self._wake = -1
        self._watcher: threading.Thread | None = None
        if setup.tp == 1:
            return
        self._wake = os.eventfd(0)
        for rank in range(1, setup.tp):
            mine = msgspec.structs.replace(setup, rank=rank, parent_pid=os.getpid())
            child = subprocess.Popen([sys.executable, "-P", "-m", "specd.targets.sglang.rank"], stdin=subprocess.PIPE)
            self._children.append(child)
            self._write(child, msgspec.json.encode(mine))
        self._watcher = threading.Thread(target=self._watch, name="specd-ranks", daemon=True)
        self._watcher.start()

    def send(self, step: Step) -> None:
        """Send a forward to every other rank. Raises RuntimeError when one is gone."""
        frame = msgspec.msgpack.encode(step) if self._children else b""
        for child in self._children:
            self._write(child, frame)

    def release(self) -> None:
        """Let the ranks leave their process groups and end, while rank 0 does the same. Idempotent."""
        if self._closing or self._watcher is None:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._watcher.join()
        for child in self._children:
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()

    def close(self) -> None:
        """End the ranks, killing them after STOP_S. Idempotent."""
        self.release()
        if self._wake < 0:
            return
        for child in self._children:
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        os.close(self._wake)
        self._children, self._wake = [], -1

    def _write(self, child: subprocess.Popen[bytes], frame: bytes) -> None:
        assert child.stdin is not None
        try:
            child.stdin.write(len(frame).to_bytes(4, "little") + frame)
            child.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise RuntimeError(f"tensor-parallel rank with pid {child.pid} is gone: {error}") from error

    def _watch(self) -> None:
        poller = select.poll()
        pidfds = {os.pidfd_open(child.pid): rank for rank, child in enumerate(self._children, start=1)}
        for fd in (self._wake, *pidfds):
            poller.register(fd, select.POLLIN)
        dead = [pidfds[fd] for fd, _ in poller.poll() if fd in pidfds]
        for fd in pidfds:
            os.close(fd)
        if dead and not self._closing:
            log.critical("tensor-parallel rank %s died: this process ends, too", ", ".join(map(str, dead)))
            # Rank 0 may hang in a collective for ever, deep in a library: nothing else ends it.
            os._exit(1)


def free_port() -> int:
    """A TCP port of the loopback that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
