"""Several processes make what one would make, in its order; none outlives the others, and a dead one is said."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chats import talk, write_base, write_rows, write_tokenizer
from specd.config.settings import DataConfig
from specd.data.faults import RowError
from specd.data.portion import Portion
from specd.data.samples import Job, Maker
from specd.data.workers import AHEAD, Chunk, Workers, portions
from specd.errors import DataError

PREPARE = """
import sys
from pathlib import Path
from specd.config.settings import DataConfig
from specd.data.dataset import prepare
from specd.data.workers import Workers
begin = Workers.__init__
def started(self, *arguments, **settings):
    begin(self, *arguments, **settings)
    print(*self.pids, flush=True)
Workers.__init__ = started
path, tokenizer, cache = sys.argv[1:]
config = DataConfig(path=path, cache_dir=cache, processes=2)
prepare(config, Path(tokenizer), on_rows=lambda rows: print(rows, flush=True))
"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def job(tokenizer: Path, **settings: Any) -> Job:
    return Job(DataConfig(**settings), tokenizer, 2)


def chunks(count: int) -> Iterator[Chunk]:
    """Of unequal length, so that they are not finished in their order; some rows are bad."""
    for number in range(count):
        rows: Chunk = [(f"row {number}.0", RowError(f"row {number}.0", "no JSON", "is not JSON"))]
        rows += [
            (f"row {number}.{i}", {"messages": talk(f"Question {number}", f"Answer {i}. " * (1 + number % 3 * 40))})
            for i in range(1, 1 + (count - number) % 5 * 4)
        ]
        yield rows


def same(one: Portion, other: Portion) -> bool:
    return all(map(np.array_equal, one[:4], other[:4])) and one.report == other.report


def test_the_result_is_that_of_one_process_whatever_their_number(tokenizer: Path) -> None:
    asked = job(tokenizer)
    alone = list(portions(asked, chunks(23), 1))
    assert [len(chunk) for chunk in chunks(23)] == [portion.report.rows for portion in alone]
    found = list(portions(asked, chunks(23), 3))
    assert len(found) == 23
    assert all(map(same, found, alone))


def test_little_work_is_done_here(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specd.data.workers.Workers", lambda *_, **__: pytest.fail("others were started"))
    assert len(list(portions(job(tokenizer), chunks(5), 0))) == 5


def test_much_work_is_begun_here_until_the_others_are_there(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specd.data.workers.ALONE_S", 0.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    made: list[int] = []
    make = Maker.make

    def counted(self: Maker, rows: Chunk) -> Portion:
        made.append(len(rows))
        return make(self, rows)

    monkeypatch.setattr(Maker, "make", counted)
    (chunk,) = chunks(1)
    found = portions(job(tokenizer), repeat(chunk), 0)
    first = next(found)
    behind = before = 0
    for portion in found:
        assert same(portion, first)
        behind = behind + 1 if len(made) == before else 0
        before = len(made)
        if behind == 2 * AHEAD:
            break
    found.close()
    assert before > 1, "some were made here while the others began"


def test_what_no_row_is_to_blame_for_is_raised_here(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    with pytest.raises(DataError, match="no chat template"):
        list(portions(job(base), chunks(3), 2))
    with (
        pytest.raises(DataError, match="no usable tokenizer"),
        Workers(job(tmp_path / "none"), 2, reads_text=True) as some,
    ):
        list(some.make(chunks(3)))


def test_a_killed_process_is_an_error_and_no_hang(tokenizer: Path) -> None:
    def killing(workers: Workers) -> Iterator[Chunk]:
        (chunk,) = chunks(1)
        yield chunk
        yield chunk
        os.kill(workers.pids[0], signal.SIGKILL)
        yield from repeat(chunk)

    workers = Workers(job(tokenizer), 2)
    with workers, pytest.raises(DataError, match=r"was killed by SIGKILL, perhaps .*memory.*data\.processes=1"):
        for _ in workers.make(killing(workers)):
            pass
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.pids), "the others are ended, and reaped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_they_end_with_the_one_that_started_them_and_say_nothing(
    tokenizer: Path, tmp_path: Path, number: signal.Signals
) -> None:
    path = write_rows(tmp_path / "a.jsonl", *[{"messages": talk("Hi", "Hello. " * 200)}] * 20_000)
    command = [sys.executable, "-P", "-c", PREPARE, path, str(tokenizer), str(tmp_path / "cache")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        ends = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        assert parent.stdout.readline() == "64\n"
        os.killpg(parent.pid, number)
        parent.stdout.read()  # those that it wrote before it ended
        said = parent.stderr.read()
        parent.wait(60)
    for end in ends:
        assert select.select([end], [], [], 60)[0], "it runs on"
        os.close(end)
    assert said.count("Traceback") == (number == signal.SIGINT)
    if number == signal.SIGINT:
        assert not [*(tmp_path / "cache").iterdir()], "nothing is left behind"
