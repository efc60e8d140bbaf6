"""The transport benchmark's table, from a made-up run on two GPUs."""

from __future__ import annotations

import io
import re

import msgspec
import pytest
from rich.console import Console

from bench_results import two_gpus
from specd.bench.transport import table
from specd.bench.transport.result import TransportResult
from specd.bench.transport.table import render


def printed(result: TransportResult, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(*render(result), sep="\n")
    return console.export_text()


def test_the_table_shows_every_row_at_80_columns() -> None:
    result = two_gpus()
    text = printed(result, 80)
    assert text.count("✓") == len(result.rows) + 1  # the legend has one, too
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "peer: daemon on cuda:0, trainer on cuda:1" in text
    assert "auto takes cuda_ipc\n  not nixl, nccl, shm, bytes: after cuda_ipc in auto's order" in text
    assert re.search(r"nccl, 256 MiB: daemon +678 +529 +22.0%", text)
    assert "not shm: no <shared> memory [here]" in text
    assert "peer: nixl: pip install 'specd-daemon[nixl]'" in text
    assert "2 × NVIDIA H200" in text


def test_a_wrong_row_stands_out() -> None:
    result = two_gpus()
    wrong = msgspec.structs.replace(result.rows[0], verified=False)
    result = msgspec.structs.replace(result, rows=(wrong, *result.rows[1:]))
    text = printed(result, 80)
    assert text.count("✗") == 1
    assert text.count("WRONG bytes arrived: 4 KiB\n") == 1


def test_a_run_without_rows_says_what_auto_takes() -> None:
    result = msgspec.structs.replace(two_gpus(), rows=(), slowdowns=())
    assert "auto takes cuda_ipc" in printed(result, 80)


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (394.6, "395"), (54.31, "54.3"), (1.234, "1.23")])
def test_rates_are_readable(value: float | None, text: str) -> None:
    assert table.rate(value) == text
