"""How much transfers slow computation beside them: matmuls on one GPU, alone and while a lane streams, in turn."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from specd.bench.transport.loaded import LoadedHost
from specd.bench.transport.matmuls import MatmulLoad
from specd.bench.transport.timing import Mover, spread
from specd.transports.base import Traits
from specd.transports.testing.hosts import LocalHost

SEGMENT_S: Final = 0.4
SEGMENTS: Final = 5
"""Alone, during, alone, during, alone: a GPU that gets warm slows both."""
BURST: Final = 16
"""Transfers between two looks at the clock."""
SIDE_S: Final = SEGMENTS * (SEGMENT_S + 0.15)
"""About what one side costs, the starts of the load included."""


def loads_a_gpu(traits: Traits) -> bool:
    """Whether a GPU moves the bytes between two processes, so that its matmuls may be slower meanwhile.

    It does so from its own memory, and from host memory that the trainer maps. Anything else costs CPU time.
    """
    return traits.scope != "process" and (traits.one_sided or "device" in traits.memory)


class Load:
    """Matmuls in this process, on the trainer's GPU."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._running: MatmulLoad | None = None

    def start(self) -> None:
        self._running = MatmulLoad(self._device)

    def stop(self) -> float:
        """TFLOP/s since `start`."""
        assert self._running is not None
        running, self._running = self._running, None
        return running.stop()


class HostLoad:
    """Matmuls in the process that serves, beside what the transport does there: a target's place."""

    def __init__(self, host: LocalHost | LoadedHost) -> None:
        assert isinstance(host, LoadedHost), "a load is measured beside a transport between two processes"
        self.start: Callable[[], None] = host.start_load
        self.stop: Callable[[], float] = host.stop_load


def slowdown(load: Load | HostLoad, wire: Mover, nbytes: int) -> dict[str, Any]:
    """The measured fields of a Slowdown."""
    alone: list[float] = []
    during: list[float] = []
    moved, streamed_s = 0, 0.0
    wire.stream(nbytes, BURST)
    for segment in range(SEGMENTS):
        load.start()
        try:
            end = time.perf_counter() + SEGMENT_S
            if segment % 2 == 0:
                threading.Event().wait(SEGMENT_S)
            else:
                while time.perf_counter() < end:
                    streamed_s += wire.stream(nbytes, BURST)
                    moved += nbytes * BURST
        finally:
            reached = load.stop()
        (during if segment % 2 else alone).append(reached)
    before, beside = statistics.median(alone), statistics.median(during)
    return {
        "size_bytes": nbytes,
        "alone_tflop_per_s": round(before, 1),
        "during_tflop_per_s": round(beside, 1),
        "slowdown": round(1 - beside / before, 4),
        "gb_per_s": round(moved / streamed_s / 1e9, 4),
        "alone_spread": round(spread(alone), 4),
    }
