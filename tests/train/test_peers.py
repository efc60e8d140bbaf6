"""Who lives, and why a run ends: from real processes and from beats that stop."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from groups import connection, new_store
from specd.errors import ConfigError, DataError, RejectedError
from specd.train.peers import Ending, Member, Watch, exit_code, tell

HERE = "a kernel"


def member(rank: int, host_id: str = HERE, pid: int = 0) -> Member:
    return Member(rank=rank, host=f"h{rank}", host_id=host_id, pid=pid or os.getpid())


@contextmanager
def watching(store: Any, me: Member, *others: Member, patience_s: float = 30.0) -> Iterator[Watch]:
    for one in (me, *others):
        store.set(f"beat/{one.rank}", "0")
    watch = Watch(connection(store), me, [me, *others], patience_s)
    watch.start()
    try:
        yield watch
    finally:
        watch.close()


def test_a_peer_that_is_killed_is_seen_at_once() -> None:
    store = new_store()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with watching(store, member(0), member(1, pid=process.pid), patience_s=60) as watch:
            assert not watch.wait(0.3)
            assert watch.error() is None
            called: list[bool] = []
            watch.at_end(lambda: called.append(watch.wait(0)))
            began = time.monotonic()
            process.kill()
            assert watch.wait(5)
            assert time.monotonic() - began < 2
            error = watch.error()
        assert error is not None
        assert str(error) == "rank 1 on h1: its process is dead"
        assert (error.said, error.code, error.interrupted) == (False, 1, False)
        assert called == [True]


def test_one_that_is_done_may_go() -> None:
    store = new_store()
    with (
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process,
        watching(store, member(0), member(1, pid=process.pid), patience_s=0.3) as watch,
    ):
        store.set("beat/1", "done")
        process.kill()
        assert not watch.wait(1)


@pytest.mark.parametrize("host_id", [HERE, "another kernel", ""])
def test_a_peer_without_a_beat_is_lost_when_patience_ends(host_id: str) -> None:
    """As one that is stopped, or whose host is cut off. Its process id means nothing on another host."""
    store = new_store()
    other = member(0, host_id, pid=0 if host_id == HERE else 1 << 22)
    with watching(store, member(2), other, member(1), patience_s=0.6) as watch:
        for beat in range(8):  # while it beats, it lives
            store.set("beat/0", f"{beat}")
            store.set("beat/1", f"{beat}")
            assert not watch.wait(0.12)
        with watching(store, member(1), patience_s=9):
            assert watch.wait(5)
            error = watch.error()
        assert error is not None
        assert "rank 0 on h0: no sign of life for 0.6 s (train.peer_patience_s)" in str(error)
        assert not error.said, "rank 0 cannot, and this rank noticed it first"


def test_the_first_reason_stands_and_rank_0_says_it() -> None:
    store = new_store()
    first = Ending(rank=2, host="h2", kind="error", reason="no data", code=2, teller=2)
    with watching(store, member(0), member(1), member(2)) as zero, watching(store, member(1)) as one:
        assert tell(store, first) == first
        assert tell(store, Ending(rank=1, host="h1", kind="lost", reason="x", teller=1)) == first
        for watch in (zero, one):
            assert watch.wait(5)
        errors = zero.error(), one.error()
    assert [str(error) for error in errors] == ["rank 2 on h2: no data"] * 2
    assert [error and (error.said, error.code) for error in errors] == [(False, 2), (True, 2)]


def test_a_thread_that_is_closed_leaves_no_descriptor() -> None:
    store = new_store()
    before = len(os.listdir("/proc/self/fd"))
    with watching(store, member(0), member(1), member(2)):
        pass
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # the connection may still close


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (ConfigError("x"), 2), (RejectedError("x"), 2), (DataError("x"), 1), (OSError(), 1)],
)
def test_a_wrong_start_has_its_own_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code
