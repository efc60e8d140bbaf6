"""What is written is what is read, in portions or at once; a scratch leaves nothing behind, and a full disk is said."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from specd.data.portion import Portion, Report
from specd.data.store import ARRAYS, Scratch, Stored, load
from specd.errors import DataError


def portion(*lengths: int) -> Portion:
    rng = np.random.default_rng(sum(lengths))
    return Portion.of(
        [(row, rng.integers(0, 99, size).astype(np.int32), rng.random(size) < 0.5) for row, size in enumerate(lengths)],
        rows=len(lengths) + 1,
    )


def write(home: Path, *portions: Portion, name: str = "kept") -> Stored:
    with Scratch(home) as scratch:
        report = Report()
        for part in portions:
            scratch.add(part, report.rows)
            report = report.plus(part.report, 0)
        return scratch.keep(name, report)


def test_portions_are_read_as_one(tmp_path: Path) -> None:
    parts = portion(3, 1, 4), portion(), portion(5)
    written = write(tmp_path, *parts)
    found = load(tmp_path / "kept")
    assert found is not None
    for stored in (written, found):
        assert np.array_equal(stored.arrays["tokens"], np.concatenate([part.tokens for part in parts]))
        assert np.array_equal(stored.arrays["loss_mask"], np.concatenate([part.loss_mask for part in parts]))
        assert stored.arrays["starts"].tolist() == [0, 3, 4, 8, 13]
        assert stored.arrays["rows"].tolist() == [0, 1, 2, 5]
        assert {name: array.dtype for name, array in stored.arrays.items()} == {
            k: np.dtype(v) for k, v in ARRAYS.items()
        }
    assert (found.digest, found.report) == (written.digest, written.report)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_digest_is_that_of_the_samples(tmp_path: Path) -> None:
    first, second = portion(3, 1), portion(5)
    whole = write(tmp_path, first, second, name="a").digest
    assert write(tmp_path, first, portion(), second, name="b").digest == whole, "whatever the rows between them"
    assert write(tmp_path, second, first, name="c").digest != whole
    lengths = [portion(3, 1)._replace(lengths=np.array(parts)) for parts in ([2, 2], [3, 1])]
    assert len({write(tmp_path, part, name=f"d{i}").digest for i, part in enumerate(lengths)}) == 2


def test_another_process_that_was_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = write(tmp_path, portion(3))
    assert write(tmp_path, portion(3)).digest == first.digest
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert not caplog.records


def test_what_is_not_kept_leaves_nothing(tmp_path: Path) -> None:
    with Scratch(tmp_path) as scratch:
        scratch.add(portion(3), 0)
        assert [*tmp_path.iterdir()]
    assert not [*tmp_path.iterdir()]


def test_a_home_that_cannot_be_written_costs_preparing_it_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        stored = write(tmp_path / "file", portion(3, 4))
    assert "cannot keep prepared data" in caplog.text
    assert not [*(tmp_path / "temporary").iterdir()]
    assert stored.arrays["starts"].tolist() == [0, 3, 7], "still there, though its file has no name"


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Scratch(tmp_path) as scratch:
        monkeypatch.setattr(Scratch, "_append", full)
        with pytest.raises(DataError, match=r"cannot write prepared data in .*: No space left.*data\.cache_dir"):
            scratch.add(portion(3), 0)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("damage", ["short", "gone", "other", "report", "kind"])
def test_what_is_damaged_is_not_read(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, portion(3, 4))
    tokens, report = tmp_path / "kept" / "tokens.npy", tmp_path / "kept" / "report.json"
    if damage == "short":
        tokens.write_bytes(tokens.read_bytes()[:-4])
    elif damage == "gone":
        tokens.unlink()
    elif damage == "other":
        np.save(tokens, np.zeros(9, np.int32))
    elif damage == "kind":
        np.save(tokens, np.zeros(7, np.int64))
    else:
        report.write_text("{")
    assert load(tmp_path / "kept") is None
    assert "is damaged" in caplog.text
    assert not (tmp_path / "kept").exists()
    assert load(tmp_path / "kept") is None, "and what is not there is not damaged"
