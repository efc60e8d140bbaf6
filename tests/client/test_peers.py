"""Peers: who gets which batch, and how fast batches come over daemons that are unlike each other."""

from __future__ import annotations

import pytest

from simulated import Run, Simulated


def rate(*daemons: Simulated, depth: int, warm: int = 20, credits: int | None = None) -> float:
    """Batches a second, once all is known."""
    run = Run(daemons, depth, credits)
    run.take(warm)
    return run.take(400)


@pytest.mark.parametrize("depth", [0, 1, 2, 4, 8, 30])
def test_a_slow_daemon_makes_nothing_slower(depth: int) -> None:
    for seconds in (0.011, 0.02, 0.05, 0.2, 3.0):
        alone = rate(Simulated(0.01), depth=depth)
        both = rate(Simulated(0.01), Simulated(seconds), depth=depth)
        reverse = rate(Simulated(seconds), Simulated(0.01), depth=depth)
        assert min(both, reverse) >= 0.99 * alone, (seconds, both, reverse, alone)


def test_a_slow_daemon_with_few_credits_beside_it_makes_nothing_slower() -> None:
    alone = rate(Simulated(0.01), depth=8, credits=5)
    assert rate(Simulated(0.01), Simulated(0.2), depth=8, credits=5) >= 0.99 * alone


@pytest.mark.parametrize("jitter", [0.0, 0.005])
def test_two_equal_daemons_give_twice_the_rate_of_one(jitter: float) -> None:
    for depth in (1, 2, 4, 8):
        pair = [Simulated(0.01, jitter=jitter) for _ in range(2)]
        pair[0].capture(0.0)  # so that they differ
        enough = 1.95 if not jitter and depth > 1 else 1.5
        assert rate(*pair, depth=depth) >= enough * rate(Simulated(0.01, jitter=jitter), depth=depth), depth


def test_a_daemon_that_is_three_times_slower_takes_its_share_of_a_long_window() -> None:
    assert rate(Simulated(0.01), Simulated(0.03), depth=8) >= 125


def test_a_first_forward_that_compiles_tells_nothing_of_the_pace() -> None:
    run = Run([Simulated(0.01, first=30.0), Simulated(0.01, first=50.0)], depth=4)
    run.take(20)
    assert run.times[0] <= 30.1
    assert run.take(200) > 95
    while run.clock.now < 52:
        run.take(100)
    assert run.take(400) > 190


def test_a_slow_daemon_costs_little_and_is_found_again_when_it_is_fast() -> None:
    slow = Simulated(0.2)
    run = Run([Simulated(0.01), slow], depth=4)
    assert run.take(2000) > 90
    assert slow.asked < 2 + 20 / (20 * 0.2) + 3, "it is measured now and then"
    slow.seconds = 0.01
    run.take(1000)
    assert run.take(400) > 190


def test_a_daemon_that_stops_holds_the_run_up_once() -> None:
    stops = Simulated(0.01, stopped=(1.0, 25.0))
    run = Run([Simulated(0.01), stops], depth=4)
    run.take(4000)
    gaps = sorted(later - earlier for earlier, later in zip(run.times, run.times[1:], strict=False))
    assert 2.0 < gaps[-1] < 2.6, "late after 2 s, looked for each 0.25 s"
    assert gaps[-4] < 0.05, "what else it owes is asked of the other at once"
    assert run.clock.now < 40
    assert run.take(400) > 190, "it is used again"


def test_both_that_stop_go_on_where_they_were() -> None:
    run = Run([Simulated(0.01, stopped=(1.0, 20.0)), Simulated(0.02, stopped=(1.0, 30.0))], depth=4)
    run.take(1000)
    assert run.take(200) > 90
