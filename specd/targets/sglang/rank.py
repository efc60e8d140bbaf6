"""A rank ≥ 1 of a tensor-parallel SGLang target: `python -m specd.targets.sglang.rank`."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from typing import IO

import msgspec
import numpy as np

from specd.log import log_as
from specd.protocol import payload
from specd.targets.sglang.setup import RankSetup, Step


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next frame of a rank's standard input; None at its end."""
    head = stream.read(4)
    size = int.from_bytes(head, "little")
    frame = stream.read(size) if len(head) == 4 else b""
    return frame if len(head) == 4 and len(frame) == size else None


def die_with(parent_pid: int) -> None:
    """Exit this process as soon as its parent is dead."""
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
    log_as("rank")
    stream = sys.stdin.buffer
    frame = read_frame(stream)
    if frame is None:
        return
    setup = msgspec.json.decode(frame, type=RankSetup)
    die_with(setup.parent_pid)
    from specd.targets.sglang.capture import Capture
    from specd.targets.sglang.engine import Engine

    engine = Engine(setup)
    engine.transforms(engine.weights()["embedding"])
    while (frame := read_frame(stream)) is not None:
        step = msgspec.msgpack.decode(frame, type=Step)
        brought = [payload.unpack(each) for each in step.payloads]
        capture = Capture(taps={tap: [] for tap in step.taps}, final=[], brought=brought)
        engine.forward(np.frombuffer(step.tokens, "<i4"), step.lengths, step.stop, capture)
    engine.close()


if __name__ == "__main__":
    main()
