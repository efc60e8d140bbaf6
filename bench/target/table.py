"""The target benchmark's result as tables for a terminal, readable at 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from specd.bench.target.result import TargetProfile, TargetRatio, TargetResult, TargetRow

if TYPE_CHECKING:
    from rich.console import RenderableType


def render(result: TargetResult) -> list[RenderableType]:
    """Rates, ratios, profiles, and what was not measured."""
    from rich.text import Text

    parts: list[RenderableType] = [f"{result.target['model']}, batches of one sample; beside: {result.beside or '–'}"]
    parts.append(_table(("way", "tokens", "a forward", "tokens/s", "low–high", "forward ms"), map(_rate, result.rows)))
    if result.ratios:
        parts.append(_table(("ratio", "tokens", "value", "low–high", "bar"), map(_ratio, result.ratios)))
    parts += [Text(_profile(profile)) for profile in result.profiles]
    parts += [Text(f"not measured: {what}: {why}") for what, why in result.skipped.items()]
    return [*parts, f"{result.rounds} rounds, {result.wall_s:.0f} s"]


def _rate(row: TargetRow) -> Sequence[str]:
    forward = f"{row.forward_ms:.1f} ({row.p25_ms:.1f}–{row.p75_ms:.1f})" if row.forward_ms else "–"
    share = f"≤ {row.share}" if row.way == "daemon" and row.share > 1 else str(row.share)
    return row.way, f"{row.tokens:,}", share, f"{row.tokens_per_s:,.0f}", f"{row.low:,.0f}–{row.high:,.0f}", forward


def _ratio(ratio: TargetRatio) -> Sequence[str]:
    bar = "" if ratio.bar is None else f"{ratio.bar:g}"
    return ratio.name, f"{ratio.tokens:,}", f"{ratio.value:.3f}", f"{ratio.low:.3f}–{ratio.high:.3f}", bar


def _profile(profile: TargetProfile) -> str:
    launches = ", ".join(f"{count:,} {name}" for name, count in profile.launches.items()) or "none seen"
    kernels = "; ".join(f"{kernel.ms:.1f} ms {kernel.name[:40]} ({kernel.calls})" for kernel in profile.kernels[:5])
    return (
        f"{profile.way}, 1 × {profile.tokens:,}: {profile.forward_ms:.1f} ms, the device busy for "
        f"{profile.busy_ms:.1f}; launches: {launches}; {kernels}"
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> RenderableType:
    """Without a frame."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 1, 0, 0))
    for column in columns:
        made.add_column(column, justify="left" if column in ("way", "ratio") else "right")
    for row in rows:
        made.add_row(*row)
    return made
