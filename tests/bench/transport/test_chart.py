"""The transport benchmark's table, picture and page, from a made-up run on two GPUs."""

from __future__ import annotations

import io
import re
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from bench_results import two_gpus
from specd.bench.transport import chart
from specd.bench.transport.result import Result
from specd.bench.transport.table import render
from specd.errors import ConfigError


def printed(result: Result, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(*render(result), sep="\n")
    return console.export_text()


def test_the_table_shows_every_row_at_120_columns() -> None:
    result = two_gpus()
    text = printed(result, 120)
    assert text.count("✓") == len(result.rows) + 1  # the legend has one, too
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 120
    assert "peer: daemon on cuda:0, trainer on cuda:1" in text
    assert "auto takes cuda_ipc\n  not nixl, nccl, shm, bytes: after cuda_ipc in auto's order" in text
    assert re.search(r"nccl, 256 MiB, on the daemon's GPU +678 +529 +22.0%", text)
    assert "not shm: no <shared> memory [here]" in text
    assert "peer: nixl: pip install 'specd[nixl]'" in text
    assert "2 × NVIDIA H200" in text


def test_a_wrong_row_stands_out() -> None:
    result = two_gpus()
    wrong = msgspec.structs.replace(result.rows[0], verified=False)
    result = msgspec.structs.replace(result, rows=(wrong, *result.rows[1:]))
    assert printed(result, 120).count("WRONG") == 1
    assert chart.page(result).count("WRONG") == 1


def test_a_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    chart.write(two_gpus(), path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") > 2 * int.from_bytes(data[20:24], "big")  # three panels beside another


def test_the_page_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "chart.html"
    chart.write(two_gpus(), path)
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"(?:src|href)=[\"'](?!#)|url\((?!#)|@import|<script|<link", text) == []
    assert text.count("<svg") == 1
    assert text.count("✓") == len(two_gpus().rows) + 1
    assert "no &lt;shared&gt; memory [here]" in text
    for fact in ("NVIDIA H200", "22.0%", "DFlash-5, 12,288", "specd[nixl]", "141.3 of 150 allowed"):
        assert fact in text


def test_every_lane_has_its_own_look() -> None:
    looks = [*chart.LOOKS.values(), *chart.SPARE]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    row = two_gpus().rows[0]
    plugins = [msgspec.structs.replace(row, transport=name) for name in ("pigeon", "owl")]
    assert [chart._look(lane, [row, *plugins]) for lane in ("pigeon", "owl")] == list(chart.SPARE[:2])


def test_a_run_without_rows_gives_a_page(tmp_path: Path) -> None:
    result = msgspec.structs.replace(two_gpus(), rows=(), slowdowns=())
    for name in ("chart.png", "chart.html"):
        chart.write(result, tmp_path / name)
    assert "auto takes cuda_ipc" in printed(result, 120)


@pytest.mark.parametrize(
    ("name", "reason"), [("chart.svg", "ends in .png or .html"), ("missing/chart.png", "its directory does not exist")]
)
def test_a_path_that_will_not_do(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        chart.check(tmp_path / name)
