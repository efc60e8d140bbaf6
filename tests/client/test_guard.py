"""The guard: the first error of any thread is the one that ends the run."""

from __future__ import annotations

import threading

import pytest

from specd.client.guard import Guard
from specd.errors import BatchError, DaemonError, SpecdError


def fail(error: Exception) -> None:
    raise error


def test_the_first_error_ends_the_run_and_wakes_who_waits() -> None:
    changed = threading.Condition()
    guard = Guard(changed)
    guard.check()
    with changed:
        thread = guard.start("specd-test", fail, BatchError("first"))
        assert changed.wait_for(lambda: guard.error is not None, 20)
    thread.join(20)
    assert (thread.name, thread.daemon) == ("specd-test", True)
    guard(fail, DaemonError("second"))
    with pytest.raises(BatchError, match="first"):
        guard.check()


def test_an_error_that_nobody_foresaw_is_logged_whole_and_named(caplog: pytest.LogCaptureFixture) -> None:
    guard = Guard(threading.Condition())
    guard(fail, ZeroDivisionError("by nothing"))
    with pytest.raises(SpecdError, match=r"the subscriber failed: ZeroDivisionError\('by nothing'\)"):
        guard.check()
    assert "Traceback" in caplog.text


def test_what_works_leaves_no_error() -> None:
    guard = Guard(threading.Condition())
    done: list[int] = []
    guard(done.append, 1)
    guard.check()
    assert done == [1]
