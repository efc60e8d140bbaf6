"""The result of `specd bench transport`: rows, slowdowns, what `auto` takes, and the machine."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Mode = Literal["copy", "borrow"]


class TransportRow(msgspec.Struct, frozen=True, kw_only=True):
    """One transport, one placement, one size.

    mode: `copy` delivers into the trainer's memory, `borrow` lends the slot where it lies. Times are from the
    announcement to the usable tensor, one transfer at a time; GB are 10⁹ bytes, one way. `raw_*`: a plain copy of the
    same size and kind, made in turn with the transfers; ratio: its median time over the transport's.
    `stream_*`: transfers back to back, `stream_window` of them announced ahead; median, quartiles and the slowest of
    `stream_blocks` blocks. `d2h_*`: the daemon's hop of a staged transport, which is made before the announcement.
    `*_cpu_s_per_gb`: CPU seconds of each side's process. None: does not apply.
    """

    placement: str
    transport: str
    mode: Mode
    size_bytes: int
    shape: str
    p50_us: float
    p99_us: float
    min_us: float
    p25_us: float
    p75_us: float
    iterations: int
    gb_per_s: float | None
    raw_kind: str
    raw_p50_us: float | None
    raw_min_us: float | None
    raw_gb_per_s: float | None
    ratio: float | None
    stream_gb_per_s: float | None
    stream_p25_gb_per_s: float | None
    stream_p75_gb_per_s: float | None
    stream_min_gb_per_s: float | None
    stream_window: int
    stream_blocks: int
    raw_stream_gb_per_s: float | None
    stream_ratio: float | None
    d2h_gb_per_s: float | None
    d2h_raw_gb_per_s: float | None
    d2h_ratio: float | None
    trainer_cpu_s_per_gb: float | None
    daemon_cpu_s_per_gb: float | None
    verified: bool
    setup_ms: float

    @property
    def lane(self) -> str:
        """Its name in tables and charts."""
        return self.transport if self.mode == "copy" else f"{self.transport} {self.mode}"


class Slowdown(msgspec.Struct, frozen=True, kw_only=True):
    """What a stream of transfers costs matmuls (bfloat16, 8192³, back to back) on one GPU.

    side: whose GPU, and in whose process they run. slowdown: 1 − during / alone, medians of segments in turn.
    gb_per_s: of the stream meanwhile.
    """

    placement: str
    transport: str
    side: Literal["daemon", "trainer"]
    size_bytes: int
    alone_tflop_per_s: float
    during_tflop_per_s: float
    slowdown: float
    gb_per_s: float
    alone_spread: float


class Auto(msgspec.Struct, frozen=True, kw_only=True):
    """What `auto` takes for one placement (empty: nothing works), and why not each other transport."""

    placement: str
    daemon: str
    trainer: str
    name: str
    reasons: dict[str, str]


class TransportResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run. skipped: what could not be measured, by placement and transport, with the reason."""

    machine: dict[str, Any]
    budget_s: float
    wall_s: float
    auto: tuple[Auto, ...]
    rows: tuple[TransportRow, ...]
    slowdowns: tuple[Slowdown, ...]
    skipped: dict[str, str]
