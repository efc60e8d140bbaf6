"""`specd bench daemon`: its figures fit together, and a daemon that does not come up is an error."""

from __future__ import annotations

import pytest

from specd.bench.daemon import latency, overlap, sessions
from specd.errors import SpecdError


def test_latency_leaves_warm_up_out() -> None:
    found = latency("inproc", num_batches=30)
    assert (found["transport"], found["batches"]) == ("inproc", 27)
    assert 0 < found["min_ms"] <= found["p50_ms"] <= found["p99_ms"]


def test_depth_overlaps_target_and_trainer() -> None:
    rows = overlap("inproc", cost_ms=4.0, num_batches=16)
    assert [row["depth"] for row in rows] == [0, 1, 2, 4]
    assert rows[0]["speedup"] == 1.0
    assert rows[0]["iteration_ms"] >= 8
    for row in rows[1:]:
        assert row["iteration_ms"] >= 4
        assert row["speedup"] == pytest.approx(rows[0]["iteration_ms"] / row["iteration_ms"], abs=2e-3)


def test_one_of_several_sessions_is_timed_alone_and_beside_the_others() -> None:
    found = sessions("shm", count=3, step_ms=20.0, blocks=1, size=20)
    assert (found["sessions"], found["batches"]) == (3, 18)
    for kind in ("", "control_"):
        assert found[f"{kind}alone_ms"] > 0
        ratio = found[f"{kind}beside_ms"] / found[f"{kind}alone_ms"]
        assert found[f"{kind}p50_ratio"] == pytest.approx(ratio, rel=0.05, abs=0.01)


def test_a_daemon_that_does_not_come_up_is_an_error() -> None:
    with pytest.raises(
        SpecdError, match="start ended with exit code 1; its last words: specd: error: transport 'pigeon'"
    ):
        latency("pigeon", num_batches=1)
