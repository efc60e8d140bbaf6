"""The pipeline benchmark's tables: whole at 80 columns, and reasons as they are."""

from __future__ import annotations

import io

from rich.console import Console

from pipeline_results import both_lengths
from specd.bench.pipeline.table import render


def test_nothing_is_cut_at_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(*render(both_lengths()), sep="\n")
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for part in (
        "fixed lengths, ms a batch: target 11.20 (1 a forward) or 9.00 (2 a forward), draft 15.00",
        "log-normal lengths, ms a batch: target ?, draft –",
        "× origin",
        "co-located × 2",
        "≥ 0.95",
        "not measured: disaggregated over nixl: nixl is missing: pip install 'specd-daemon[nixl]'",
        "memory: daemons 2.00 GB, trainer 1.00 GB, co-located 3.00 GB · 12 s",
    ):
        assert part in " ".join(text.split()), part
