"""Transfers timed in turn with raw copies of the same size, so that the machine's drift affects both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np

ROW_S: Final = 2.0
"""Measured time a row may take when the number of iterations is left open."""
MIN_ITERATIONS: Final = 5
MAX_ITERATIONS: Final = 500
MAX_BLOCKS: Final = 50
WARM_UP: Final = 3
BLOCKS: Final = (64, 32, 16, 8)
"""Transfers in one block of a stream: the first of these that is short enough."""


class Mover(Protocol):
    """Moves bytes and returns how long it took: a transport, or the raw copy it is compared with."""

    def one(self, nbytes: int) -> float:
        """Seconds of one transfer, from its announcement until the bytes are usable."""
        ...

    def stream(self, nbytes: int, count: int) -> float:
        """Seconds of `count` transfers, as closely behind each other as this mover can."""
        ...


class Budget:
    """A limit on the whole run, shared by the rows that are still to come."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = clock()
        self.seconds = seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._begin

    @property
    def left(self) -> float:
        """Seconds; 0 when it is used up."""
        return max(0.0, self.seconds - self.spent)

    def share(self, rows: int, reserved_s: float = 0.0) -> float:
        """Seconds for the next of `rows` rows. Short rows leave their rest to the later ones."""
        return min(ROW_S, max(0.0, self.left - reserved_s) / max(1, rows))


def latency(wire: Mover, raw: Mover | None, nbytes: int, allowance_s: float, iterations: int) -> dict[str, Any]:
    """The fields of a Row that one transfer at a time gives. iterations: 0 for as many as the time allows."""
    warm = [_pair(wire, raw, nbytes)]
    while len(warm) < WARM_UP and sum(map(sum, warm)) < allowance_s:
        warm.append(_pair(wire, raw, nbytes))
    fits = int(allowance_s / max(1e-9, min(map(sum, warm))))
    count = iterations or max(MIN_ITERATIONS, min(MAX_ITERATIONS, fits))
    wires, raws = (list(column) for column in zip(*(_pair(wire, raw, nbytes) for _ in range(count)), strict=True))
    p50, plain = statistics.median(wires), statistics.median(raws)
    return {
        "iterations": count,
        "p50_us": round(p50 * 1e6, 2),
        "p99_us": round(float(np.quantile(wires, 0.99)) * 1e6, 2),
        "min_us": round(min(wires) * 1e6, 2),
        "p25_us": round(float(np.quantile(wires, 0.25)) * 1e6, 2),
        "p75_us": round(float(np.quantile(wires, 0.75)) * 1e6, 2),
        "gb_per_s": _rate(nbytes, p50) if raw else None,
        "raw_p50_us": round(plain * 1e6, 2) if raw else None,
        "raw_min_us": round(min(raws) * 1e6, 2) if raw else None,
        "raw_gb_per_s": _rate(nbytes, plain) if raw else None,
        "ratio": round(plain / p50, 4) if raw else None,
    }


def streamed(wire: Mover, raw: Mover, nbytes: int, window: int, allowance_s: float, blocks: int = 0) -> dict[str, Any]:
    """The fields of a Row that transfers back to back give. blocks: 0 for as many as the time allows."""
    # The first block is the warm-up, and tells how long the others may be.
    each = (wire.stream(nbytes, window) + raw.stream(nbytes, window)) / window
    length = next((n for n in BLOCKS if n > window and n * each <= allowance_s / 8), window)
    count = blocks or max(2, min(MAX_BLOCKS, int(allowance_s / max(1e-9, each * length))))
    pairs = [(wire.stream(nbytes, length), raw.stream(nbytes, length)) for _ in range(count)]
    rates = [nbytes * length / wires / 1e9 for wires, _ in pairs]
    plain = statistics.median(raws for _, raws in pairs)
    median = statistics.median(wires for wires, _ in pairs)
    return {
        "stream_gb_per_s": _rate(nbytes * length, median),
        "stream_p25_gb_per_s": round(float(np.quantile(rates, 0.25)), 4),
        "stream_p75_gb_per_s": round(float(np.quantile(rates, 0.75)), 4),
        "stream_min_gb_per_s": round(min(rates), 4),
        "stream_window": window,
        "stream_blocks": count,
        "raw_stream_gb_per_s": _rate(nbytes * length, plain),
        "stream_ratio": round(plain / median, 4),
    }


NO_STREAM: Final[dict[str, Any]] = {
    "stream_gb_per_s": None,
    "stream_p25_gb_per_s": None,
    "stream_p75_gb_per_s": None,
    "stream_min_gb_per_s": None,
    "stream_window": 0,
    "stream_blocks": 0,
    "raw_stream_gb_per_s": None,
    "stream_ratio": None,
}
NO_HOP: Final[dict[str, Any]] = {"d2h_gb_per_s": None, "d2h_raw_gb_per_s": None, "d2h_ratio": None}


def hop(staging: Mover, raw: Mover, nbytes: int, allowance_s: float, iterations: int) -> dict[str, Any]:
    """The fields of a Row for the daemon's own hop, one at a time."""
    found = latency(staging, raw, nbytes, allowance_s, iterations)
    return {
        "d2h_gb_per_s": found["gb_per_s"],
        "d2h_raw_gb_per_s": found["raw_gb_per_s"],
        "d2h_ratio": found["ratio"],
    }


def spread(values: Sequence[float]) -> float:
    """(largest − smallest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def _pair(wire: Mover, raw: Mover | None, nbytes: int) -> tuple[float, float]:
    """Seconds of one transfer, and of one raw copy just before it."""
    plain = raw.one(nbytes) if raw else 0.0
    return wire.one(nbytes), plain


def _rate(nbytes: int, seconds: float) -> float:
    return round(nbytes / seconds / 1e9, 4)
