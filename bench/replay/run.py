"""`specd bench replay`: both parts in one run, and its result as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from specd.bench.machine import machine
from specd.bench.replay.behind import Behind, behind
from specd.bench.replay.lanes import LaneRow, rows
from specd.bench.target.run import Plan, settings_for
from specd.config.settings import ReplayConfig
from specd.errors import ConfigError
from specd.replay.files import GB, NAME

if TYPE_CHECKING:
    from rich.console import RenderableType


class ReplayResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run. lanes: each tier alone. behind: of a daemon, None without a model."""

    machine: dict[str, Any]
    device: str
    slot_bytes: int
    lanes: tuple[LaneRow, ...]
    behind: Behind | None


def run(
    directory: Path | None,
    *,
    gb: float,
    ram_gb: float,
    device: str,
    slot_bytes: int,
    asked: float,
    model: str,
    tokens: int,
    target: Mapping[str, Any],
    rounds: int,
    count: int,
    step_ms: float,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[ReplayResult], None] = lambda result: None,
) -> ReplayResult:
    """Measure the tiers, then a daemon of `model` if one is given. keep: is given the result after each part.

    Raises ConfigError for what cannot be measured.
    """
    import torch

    config = ReplayConfig(dir=str(directory or ""), gb=gb if directory else 0.0, ram_gb=ram_gb)
    if not config.on or bool(directory) != bool(gb):
        asked_for = f"DIR {directory or 'none'}, --gb {gb:g}, --ram-gb {ram_gb:g}"
        raise ConfigError(f"{asked_for}: nothing to measure; expected DIR with --gb, or --ram-gb")
    if directory is not None and (directory / NAME).exists():
        raise ConfigError(f"{directory} holds states already: give a directory that this may write to and empty")
    where = device if device != "auto" else "cuda:0" if torch.cuda.is_available() else "cpu"
    found = ReplayResult(machine=machine(), device=where, slot_bytes=slot_bytes, lanes=(), behind=None)
    budgets = {"disk": round(config.gb * GB), "memory": round(ram_gb * GB)}
    for row in rows(where, directory, slot_bytes=slot_bytes, asked=asked, progress=progress, **budgets):
        found = msgspec.structs.replace(found, lanes=(*found.lanes, row))
        keep(found)
    if model:
        settings = settings_for(model, Plan(sizes=(tokens,)), target)
        try:
            measured = behind(settings, config, rounds=rounds, count=count, step_ms=step_ms, progress=progress)
        finally:
            if directory is not None:
                (directory / NAME).unlink(missing_ok=True)
        found = msgspec.structs.replace(found, behind=measured)
        keep(found)
    return found


def render(result: ReplayResult) -> list[RenderableType]:
    """Tables for a terminal, readable at 80 columns."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), title=f"GB/s, slots of {result.slot_bytes:,} B on {result.device}")
    for name in ("tier", "slots", "write", "raw", "asked", "skipped", "read", "raw", "one, ms"):
        table.add_column(name, justify="left" if name == "tier" else "right")
    for row in result.lanes:
        kind = f"{row.tier}{', O_DIRECT' if row.direct else ''}"
        rates = [f"{rate:.2f}" for rate in (row.write, row.raw_write, row.asked)]
        more = f"{row.skipped:.1%}", f"{row.read:.2f}", f"{row.raw_read:.2f}", f"{row.read_ms:.1f}"
        table.add_row(kind, str(row.slots), *rates, *more)
    if (seen := result.behind) is None:
        return [table]
    trainer = f"busy for {seen.step_ms:g} ms a batch" if seen.step_ms else "never busy"
    return [
        table,
        f"{seen.target}, batches of {seen.tokens:,} tokens, a trainer {trainer}: {seen.computed:,.0f} tokens/s, with "
        f"states kept {seen.kept:,.0f}: × {seen.ratio:.3f} ({seen.low:.3f}–{seen.high:.3f} over {seen.rounds} rounds)",
        f"kept {seen.written:,} batches, {seen.gb:.1f} GB at {seen.write:.2f} GB/s, {seen.skipped:.1%} skipped; "
        f"read back at {seen.replayed:,.0f} tokens/s, {seen.hits:.1%} of them",
    ]
