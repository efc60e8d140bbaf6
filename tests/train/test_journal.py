"""A run's journal: exact, cut back to a checkpoint, and whole on a disk that is full."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from msgspec import structs
from msgspec.json import encode

from runs import CONFIG, Source, curve, full_disk, records, run
from specd.errors import CheckpointError
from specd.protocol.batch import Batch
from specd.train.journal import Journal, StepRecord, bound, read
from step_records import record


def test_journal_keeps_floats_exactly_and_cuts_back(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with Journal(path) as journal:
        for step in range(1, 6):
            journal.append(record(step, loss=math.pi / step))
    assert [line.loss for line in read(path)] == [math.pi / step for step in range(1, 6)]
    with path.open("ab") as file:
        file.write(b'{"step": 6, "epo')
    assert len(read(path)) == 5
    with Journal(path, step=3) as journal:
        journal.append(record(4, loss=0.5))
    assert [(line.step, line.loss) for line in read(path)][3:] == [(4, 0.5)]
    with pytest.raises(CheckpointError, match="ends at step 4, the checkpoint is at step 9"):
        Journal(path, step=9)
    assert len(read(path)) == 4, "a refusal changes nothing"


def test_bound_names_the_largest_share() -> None:
    assert (bound(3, 1, 2), bound(0, 2, 1), bound(1, 1, 1)) == ("target", "wire", "trainer")
    assert record(1).bound == "target"


def test_a_line_that_does_not_fit_leaves_nothing_behind_and_can_be_written_later(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with full_disk() as room, Journal(path) as journal:
        journal.append(record(1))
        size = path.stat().st_size
        room(size + 50)
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl.*free some space.*specd resume"):
                journal.append(record(2))
            assert path.stat().st_size == size
        room(0)
        journal.append(record(2))
    assert [line.step for line in read(path)] == [1, 2]


def test_the_error_of_a_full_disk_is_the_one_that_leaves_the_journal(tmp_path: Path) -> None:
    def fill() -> None:
        with Journal(tmp_path / "metrics.jsonl") as journal:
            room(50)
            journal.append(record(1))

    with full_disk() as room, pytest.raises(CheckpointError, match="free some space"):
        fill()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_journal_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where a directory is expected")
    with pytest.raises(CheckpointError, match=r"cannot write .*run/metrics\.jsonl"):
        Journal(tmp_path / "run" / "metrics.jsonl")


@pytest.mark.parametrize("log_every", [1, 2, 4])
@pytest.mark.parametrize("freed", [False, True])
def test_a_run_on_a_full_disk_ends_with_one_error_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int, freed: bool
) -> None:
    """freed: whether there is space again by the time the run saves its checkpoint."""
    run(tmp_path / "whole")
    cut, config = tmp_path / "cut", structs.replace(CONFIG, log_every=log_every, save_every=4)

    def fill(batch: Batch) -> None:
        if (batch.epoch, batch.index) == (1, 4):
            room((cut / "metrics.jsonl").stat().st_size + 100)

    class Filled(Journal):
        def append(self, record: StepRecord) -> None:
            try:
                super().append(record)
            finally:
                if freed:
                    room(0)

    with full_disk() as room, monkeypatch.context() as patched:
        patched.setattr("specd.train.loop.Journal", Filled)
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl.*free some space.*specd resume"):
            run(cut, config, source=Source(fill))
    assert (cut / "metrics.jsonl").read_bytes().endswith(b"\n")
    newest = max(path.name for path in (cut / "checkpoints").iterdir())
    assert newest == f"step-{records(cut)[-1].step:08d}"
    assert (newest > "step-00000004") is freed
    run(cut, config, resume=True)
    assert curve(cut) == curve(tmp_path / "whole")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([1, 2, 2], "line 3 is step 2, expected step 3"),
        ([1, 2, 4], "line 3 is step 4, expected step 3"),
        ([2], "line 1 is step 2, expected step 1"),
        ([1, None, 2], "line 3 is step 2, behind lines that cannot be read"),
    ],
)
def test_a_journal_of_two_writers_is_refused(tmp_path: Path, lines: list[int | None], message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(b'{"step"\n' if step is None else encode(record(step)) + b"\n" for step in lines))
    before = path.read_bytes()
    for use in (read, lambda path: Journal(path, step=9)):
        with pytest.raises(CheckpointError, match=rf"metrics\.jsonl: {message}.*start a new run in another --output"):
            use(path)
    assert path.read_bytes() == before


def test_what_a_crash_leaves_at_the_end_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = encode(record(1)) + b"\n"
    path.write_bytes(whole + b'{"step":2,')
    assert [line.step for line in read(path)] == [1]
    assert not caplog.records
    path.write_bytes(whole + b"\0\0\n\0\n{")
    assert [line.step for line in read(path)] == [1]
    assert "ignoring everything from byte" in caplog.text
    with Journal(path, step=1) as journal:
        journal.append(record(2))
    assert [line.step for line in read(path)] == [1, 2]
