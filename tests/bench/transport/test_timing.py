"""The arithmetic of the transport benchmark, with movers whose times are known."""

from __future__ import annotations

import pytest

from movers import Timed
from specd.bench.transport import timing

MIB = 1 << 20


def test_latency_is_the_median_next_to_raw_copies_in_turn() -> None:
    log: list[str] = []
    wire, raw = Timed(1e-3, 2e-3, 6e-3, log=log, name="wire"), Timed(1e-3, log=log, name="raw")
    found = timing.latency(wire, raw, 2_000_000, 1.0, iterations=6)
    assert log == ["raw", "wire"] * (timing.WARM_UP + 6)
    assert (found["p50_us"], found["min_us"], found["raw_p50_us"]) == (2000, 1000, 1000)
    assert (found["gb_per_s"], found["raw_gb_per_s"], found["ratio"]) == (1.0, 2.0, 0.5)
    assert found["min_us"] <= found["p25_us"] <= found["p50_us"] <= found["p75_us"] <= found["p99_us"] <= 6000


def test_without_a_raw_copy_there_is_no_rate() -> None:
    found = timing.latency(Timed(3e-6), None, MIB, 1.0, iterations=5)
    assert found["p50_us"] == 3
    assert {found[key] for key in ("gb_per_s", "raw_p50_us", "raw_min_us", "raw_gb_per_s", "ratio")} == {None}


@pytest.mark.parametrize(
    ("seconds", "allowance_s", "count"),
    [(1e-3, 0.2, 100), (1e-6, 2.0, timing.MAX_ITERATIONS), (0.5, 0.2, timing.MIN_ITERATIONS)],
)
def test_as_many_iterations_as_the_time_allows(seconds: float, allowance_s: float, count: int) -> None:
    found = timing.latency(Timed(seconds), Timed(seconds), MIB, allowance_s, iterations=0)
    assert found["iterations"] == count


def test_a_stream_is_measured_in_blocks_in_turn() -> None:
    log: list[str] = []
    wire, raw = Timed(4e-3, log=log, name="wire"), Timed(2e-3, log=log, name="raw")
    found = timing.streamed(wire, raw, 1_000_000, 4, 1.0)
    assert log[:2] == ["wire × 4", "raw × 4"]
    assert set(log[2:]) == {"wire × 32", "raw × 32"}
    assert log[2:] == ["wire × 32", "raw × 32"] * found["stream_blocks"]
    assert (found["stream_gb_per_s"], found["raw_stream_gb_per_s"], found["stream_ratio"]) == (0.5, 1.0, 0.5)
    assert found["stream_min_gb_per_s"] == found["stream_p25_gb_per_s"] == found["stream_p75_gb_per_s"] == 0.5
    assert found["stream_window"] == 4


def test_slow_transfers_are_streamed_in_short_blocks() -> None:
    log: list[str] = []
    found = timing.streamed(Timed(1.0, log=log, name="w"), Timed(0.1, log=log, name="r"), MIB, 3, 0.5)
    assert set(log) == {"w × 3", "r × 3"}
    assert found["stream_blocks"] == 2


def test_the_slowest_block_is_told() -> None:
    found = timing.streamed(Timed(2e-3, 2e-3, 8e-3), Timed(1e-3), 1_000_000, 16, 0.0, blocks=3)
    assert (found["stream_gb_per_s"], found["stream_min_gb_per_s"], found["stream_blocks"]) == (1.0, 0.25, 3)


def test_the_budget_is_shared_by_the_rows_that_are_left() -> None:
    now = 100.0
    budget = timing.Budget(10.0, lambda: now)
    assert budget.share(20) == 0.5
    assert budget.share(20, reserved_s=4) == 0.3
    assert budget.share(1) == timing.ROW_S
    now = 108.0
    assert (budget.left, budget.spent, budget.share(4)) == (2.0, 8.0, 0.5)
    now = 120.0
    assert (budget.left, budget.share(4)) == (0.0, 0.0)


def test_a_hop_is_a_latency_under_names_of_its_own() -> None:
    found = timing.hop(Timed(2e-3), Timed(1e-3), 1_000_000, 1.0, iterations=5)
    assert found == {"d2h_gb_per_s": 0.5, "d2h_raw_gb_per_s": 1.0, "d2h_ratio": 0.5}
    assert found.keys() == timing.NO_HOP.keys()
