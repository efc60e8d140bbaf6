"""Counters only go up, under declared names; statistics subtract."""

from __future__ import annotations

import threading

import pytest

from specd.metrics import Counters, Stats


def test_counts_start_at_zero_and_keep_their_order() -> None:
    counters = Counters(("batches", "bytes"))
    counters.add("bytes", 40)
    counters.add("bytes")
    assert counters["bytes"] == 41
    assert list(counters.values().items()) == [("batches", 0), ("bytes", 41)]
    assert repr(counters) == "Counters(bytes=41)"


def test_values_are_a_copy() -> None:
    counters = Counters(("batches",))
    counters.values()["batches"] = 5
    assert counters["batches"] == 0


def test_an_undeclared_name_and_a_step_back_are_bugs() -> None:
    counters = Counters(("batches",))
    with pytest.raises(AssertionError, match="'batch' is not declared"):
        counters.add("batch")
    with pytest.raises(AssertionError, match="'batch' is not declared"):
        counters["batch"]
    with pytest.raises(AssertionError, match="only goes up"):
        counters.add("batches", -1)
    assert counters.values() == {"batches": 0}


def test_threads_lose_no_count() -> None:
    counters = Counters(("events",))

    def count() -> None:
        for _ in range(5_000):
            counters.add("events")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters["events"] == 20_000


def test_difference_subtracts_sums_and_keeps_the_latest_state() -> None:
    earlier = Stats(
        batches=1, tokens=10, nbytes=100, target_wait_s=0.5, wire_wait_s=0.25, fetch_s=1.0, forward_s=2.0,
        shared=1, replayed=2, resubmitted=1, reconnects=1, busy_slots=3, num_slots=8, transports={"ipc://a": "bytes"},
    )  # fmt: skip
    later = Stats(
        batches=5, tokens=70, nbytes=900, target_wait_s=1.5, wire_wait_s=0.75, fetch_s=1.5, forward_s=6.0,
        shared=3, replayed=7, resubmitted=3, reconnects=2, busy_slots=2, num_slots=16, transports={"ipc://a": "shm"},
    )  # fmt: skip
    assert later.difference(earlier) == Stats(
        batches=4, tokens=60, nbytes=800, target_wait_s=1.0, wire_wait_s=0.5, fetch_s=0.5, forward_s=4.0,
        shared=2, replayed=5, resubmitted=2, reconnects=1, busy_slots=2, num_slots=16, transports={"ipc://a": "shm"},
    )  # fmt: skip
    assert later.difference(Stats()) == later
    assert Stats().transports is not Stats().transports
