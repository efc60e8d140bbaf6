"""The transport benchmark's picture, from a made-up run on two GPUs."""

from __future__ import annotations

from pathlib import Path

import msgspec
from matplotlib.figure import Figure

from bench_results import two_gpus
from specd.bench.transport import chart


def test_a_picture_is_written(tmp_path: Path) -> None:
    path = tmp_path / "chart.png"
    chart.write(two_gpus(), path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") > 2 * int.from_bytes(data[20:24], "big")  # three panels beside another


def test_a_drawing_names_what_was_measured_and_where(tmp_path: Path) -> None:
    path, result = tmp_path / "chart.svg", two_gpus()
    rows = tuple(row for row in result.rows if row.placement == "same" and row.size_bytes > 1 << 20)
    chart.write(msgspec.structs.replace(result, rows=rows), path)
    text = path.read_text(encoding="utf-8")
    for words in ("2 × NVIDIA H200", "cuda:0 to cuda:0, the same GPU · auto: cuda_ipc", "cuda_ipc borrow", "raw copy"):
        assert f"<!-- {words}" in text or words in text, words
    assert "WRONG" not in text


def test_wrong_bytes_are_crossed_out() -> None:
    wrong = msgspec.structs.replace(two_gpus().rows[0], verified=False)
    axes = Figure().subplots()
    chart._curves(axes, [wrong], lambda row: row.gb_per_s)
    chart._legend(axes, [wrong])
    (cross,) = [line for line in axes.lines if line.get_marker() == "x"]
    assert list(cross.get_xdata()) == [wrong.size_bytes]  # type: ignore[arg-type]
    legend = axes.get_legend()
    assert legend is not None
    assert "WRONG bytes" in [text.get_text() for text in legend.get_texts()]


def test_every_lane_has_its_own_look() -> None:
    looks = [*chart.LOOKS.values(), *chart.SPARE]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == len(looks)
    row = two_gpus().rows[0]
    plugins = [msgspec.structs.replace(row, transport=name) for name in ("pigeon", "owl")]
    assert [chart.look(lane, [row, *plugins]) for lane in ("pigeon", "owl")] == list(chart.SPARE[:2])


def test_a_run_without_rows_gives_a_picture(tmp_path: Path) -> None:
    chart.write(msgspec.structs.replace(two_gpus(), rows=(), slowdowns=()), tmp_path / "chart.svg")
    assert "nothing was measured" in (tmp_path / "chart.svg").read_text(encoding="utf-8")
