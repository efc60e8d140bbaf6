"""The result of `specd bench target`: rates by way, size and merge, and their ratios round by round."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Final, Literal

import msgspec

Way = Literal["bare", "beside", "daemon"]

DAEMON_BAR: Final = 0.97
SINGLE_BAR: Final = 0.85
SINGLE_TOKENS: Final = 3072
"""A sample of this many tokens should fill a forward by itself: SINGLE_BAR is for its rate over that of merged ones."""


class TargetRow(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run batches of one sample of `tokens` tokens. share: how many share a forward, of a daemon at most.

    by_round: tokens/s of each round; tokens_per_s their median, low and high the extremes. forward_ms, p25_ms, p75_ms:
    of all forwards of all rounds; 0 behind a daemon, whose batches arrive in bursts.
    """

    way: Way
    tokens: int
    share: int
    by_round: tuple[float, ...]
    tokens_per_s: float
    low: float
    high: float
    forward_ms: float = 0.0
    p25_ms: float = 0.0
    p75_ms: float = 0.0


class TargetRatio(msgspec.Struct, frozen=True, kw_only=True):
    """One rate over another of the same run. value: median over rounds, each of which ran both; low, high: extremes.

    bar: what it should reach; None: nothing.
    """

    name: str
    tokens: int
    value: float
    low: float
    high: float
    bar: float | None = None


class Kernel(msgspec.Struct, frozen=True, kw_only=True):
    """What one kernel took of a forward, all its calls together."""

    name: str
    ms: float
    calls: int


class TargetProfile(msgspec.Struct, frozen=True, kw_only=True):
    """One forward of one sample under torch's profiler. busy_ms: the device had work. kernels: the longest.

    forward_ms: median without the profiler: what it exceeds busy_ms by, the device waits for launches. launches: calls
    of CUDA that start work, by name.
    """

    way: Way
    tokens: int
    forward_ms: float
    busy_ms: float
    launches: dict[str, int]
    kernels: tuple[Kernel, ...]


class TargetResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run. beside: settings of the other bare target. skipped: what could not be measured, with the reason."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    target: dict[str, Any]
    beside: dict[str, Any]
    rounds: int
    wall_s: float
    rows: tuple[TargetRow, ...]
    ratios: tuple[TargetRatio, ...]
    profiles: tuple[TargetProfile, ...]
    skipped: dict[str, str]
    began_s: dict[str, float] = {}


def ratios(rows: Sequence[TargetRow]) -> Iterator[TargetRatio]:
    """Every comparison that these rows allow: the other settings and the daemon over bare, one sample over merged."""
    found = {(row.way, row.tokens, row.share): row for row in rows}
    sizes = sorted({row.tokens for row in rows})
    fastest = max((row for row in rows if row.way == "bare"), key=lambda row: row.tokens_per_s, default=None)
    for tokens in sizes:
        bare, other, daemon = ([row for row in rows if (row.way, row.tokens) == (way, tokens)]
                               for way in ("bare", "beside", "daemon"))  # fmt: skip
        if bare and daemon:
            best = max(bare, key=lambda row: row.tokens_per_s)
            yield _over(f"daemon / bare, {best.share} a forward", daemon[0], best, DAEMON_BAR)
        for row in other:
            if same := found.get(("bare", tokens, row.share)):
                yield _over(f"beside / bare, {row.share} a forward", row, same)
        of_ways: tuple[tuple[Way, list[TargetRow]], ...] = (("bare", bare), ("beside", other))
        for way, of_way in of_ways:
            single = found.get((way, tokens, 1))
            merged = max(of_way, key=lambda row: row.share, default=None)
            if single is None or merged is None:
                continue
            if merged.share > 1:
                bar = SINGLE_BAR if tokens == SINGLE_TOKENS else None
                yield _over(f"{way}: 1 / {merged.share} a forward", single, merged, bar)
            if fastest is not None and fastest.tokens != tokens:
                yield _over(f"{way}: 1 / bare {fastest.share} × {fastest.tokens:,}", single, fastest)


def _over(name: str, row: TargetRow, beside: TargetRow, bar: float | None = None) -> TargetRatio:
    """By rounds; rows of different sizes are of rounds at different times, all of one run."""
    each = [ours / theirs for ours, theirs in zip(row.by_round, beside.by_round, strict=False)]
    return TargetRatio(
        name=name,
        tokens=row.tokens,
        value=round(statistics.median(each), 4),
        low=round(min(each), 4),
        high=round(max(each), 4),
        bar=bar,
    )
