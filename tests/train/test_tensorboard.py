"""Scalars for TensorBoard: a resumed run goes on where it was, and a full disk is one error."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from runs import full_disk
from specd.errors import CheckpointError
from specd.train.tensorboard import Scalars
from step_records import record


@pytest.mark.parametrize(("at", "kept"), [(3, [(1, 8.0), (2, 4.0), (3, 2.667)]), (0, [])])
def test_scalars_continue_after_a_resume(tmp_path: Path, at: int, kept: list[tuple[int, float]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    with Scalars(tmp_path) as scalars:
        for step in range(1, 6):
            scalars.step(record(step, by_offset={"covered": (None, 0.25)}))
    with Scalars(tmp_path, at) as scalars:
        for step in range(at + 1, at + 4):
            scalars.step(record(step, loss=None if step == at + 2 else 9.0))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, round(event.value, 3)) for event in events.Scalars("train/loss")] == [
        *kept, (at + 1, 9.0), (at + 3, 9.0)]  # fmt: skip
    assert "teacher_forced_by_offset/01" in events.Tags()["scalars"]
    assert {tag for tag in events.Tags()["scalars"] if "covered" in tag} == {"covered_by_offset/02"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's writer
def test_scalars_that_find_the_disk_full_raise_one_error(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    scalars = Scalars(tmp_path)

    def fill() -> None:
        for step in range(1, 100):
            scalars.step(record(step))

    with full_disk() as room:
        room(500)
        for write in (fill, scalars.close):
            with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}: .*; free some space there"):
                write()
    for thread in set(threading.enumerate()) - threads:
        thread.join()  # its error belongs to this test
