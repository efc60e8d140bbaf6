"""The file of a run's held-out measurements, and what a damaged one still says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from specd.errors import CheckpointError
from specd.train.measurement import append, means, measured, read, write
from specd.train.step import Sums
from step_records import measurement


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    assert read(path) == []
    for step in (10, 20):
        append(path, measurement(step))
    assert read(path) == [measurement(10), measurement(20)]
    write(path, [measurement(10)])
    assert read(path) == [measurement(10)]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match="cannot write"):
        append(tmp_path / "none" / "validation.jsonl", measurement(10))


@pytest.mark.parametrize("line", [b'{"step": 30, "lo', b"{}\n", b"\xff\n"])
def test_what_stands_before_a_damaged_line_is_kept(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "validation.jsonl"
    for step in (10, 20):
        append(path, measurement(step))
    path.write_bytes(path.read_bytes() + line)
    with caplog.at_level(logging.WARNING):
        assert read(path) == [measurement(10), measurement(20)]
    assert "from line 3 on" in caplog.text
    path.write_bytes(path.read_bytes()[: -len(line)] + path.read_bytes().splitlines(keepends=True)[0])
    assert len(read(path)) == 2, "a step that is there twice"


def test_a_file_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    assert read(tmp_path / "missing.jsonl") == []
    with pytest.raises(CheckpointError, match="cannot read"):
        read(tmp_path)


def test_rows_without_a_prediction_have_no_loss() -> None:
    nothing = torch.zeros(2, dtype=torch.float64)
    found = measured(3, Sums(nothing, nothing, torch.zeros(2, 4, dtype=torch.float64)), (), 9)
    assert (found.loss, found.teacher_forced_accuracy, found.teacher_forced_by_offset) == (None, None, (None,) * 4)
    assert means([1.0, 3.0], [2.0, 0.0]) == (0.5, None)
