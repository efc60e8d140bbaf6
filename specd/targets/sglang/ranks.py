"""The other ranks of a tensor-parallel SGLang target: child processes that run every forward along with rank 0.

A rank gets its setup and then one Step per forward on standard input. It dies with its parent; the parent dies with
any of its ranks, because a collective that lacks one never ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import IO, Final

import msgspec
import numpy as np

log = logging.getLogger(__name__)

AT_HEAD: Final = -1
"""Step.stop of a forward that ends where lm_head would begin."""

STOP_S: Final = 10.0
"""How long a rank may take to end by itself."""


class RankSetup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one rank needs to load. path: a directory with config.json. gpu: that of rank 0; rank r has gpu + r.

    port: where the ranks of this host meet. max_tokens, context: the longest forward and sequence, in tokens.
    """

    path: str
    load_format: str
    dtype: str
    device: str
    gpu: int
    tp: int
    port: int
    memory_fraction: float
    attention_backend: str
    max_tokens: int
    context: int
    rank: int = 0
    parent_pid: int = 0


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One forward: little-endian int32 tokens, lengths of the sequences, and the layer it ends after, or AT_HEAD."""

    tokens: bytes
    lengths: list[int]
    stop: int


class Ranks:
    """Ranks 1…tp − 1 of a target, and the watch over them. None of them for tp 1."""

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
            child = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE)
            self._children.append(child)
            self._write(child, msgspec.json.encode(mine))
        self._watcher = threading.Thread(target=self._watch, name="specd-ranks", daemon=True)
        self._watcher.start()

    def send(self, step: Step) -> None:
        """Let every other rank run this forward. Raises RuntimeError when one is gone."""
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
        """End the ranks, by force those that do not. Idempotent."""
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
            # Rank 0 may hang in a collective for ever, deep in a library: nothing less ends it.
            os._exit(1)


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next frame of a rank's standard input; None at its end."""
    head = stream.read(4)
    size = int.from_bytes(head, "little")
    frame = stream.read(size) if len(head) == 4 else b""
    return frame if len(head) == 4 and len(frame) == size else None


def die_with(parent_pid: int) -> None:
    """End this process as soon as its parent is dead, whatever it is doing."""
    parent = os.pidfd_open(parent_pid)
    if os.getppid() != parent_pid:
        os._exit(1)

    def watch() -> None:
        select.select([parent], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="specd-parent", daemon=True).start()


def main() -> None:
    """Entry of a rank's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches control, which ends all in order
    level = os.environ.get("SPECD_LOG", "WARNING")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s rank %(name)s: %(message)s")
    stream = sys.stdin.buffer
    frame = read_frame(stream)
    if frame is None:
        return
    setup = msgspec.json.decode(frame, type=RankSetup)
    die_with(setup.parent_pid)
    from specd.targets.sglang.engine import Engine

    engine = Engine(setup)
    engine.weights()
    while (frame := read_frame(stream)) is not None:
        step = msgspec.msgpack.decode(frame, type=Step)
        engine.forward(np.frombuffer(step.tokens, "<i4"), step.lengths, step.stop, None)
    engine.close()


if __name__ == "__main__":
    main()
