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


def keepers(*forwards: float) -> list[Simulated]:
    """Daemons that keep states, and read them in 5 ms."""
    return [Simulated(seconds, replay=0.005) for seconds in forwards]


@pytest.mark.parametrize("depth", [0, 2, 8])
@pytest.mark.parametrize("daemons", [2, 4])
def test_batches_that_come_again_go_to_the_daemon_that_keeps_them(depth: int, daemons: int) -> None:
    pool = keepers(*[0.07] * daemons)
    run = Run(pool, depth, keeping="home")
    rates = []
    for _ in range(5):
        before = sum(daemon.hits for daemon in pool)
        rates.append((run.take(64), sum(daemon.hits for daemon in pool) - before))
    stored = [index for daemon in pool for index in daemon.kept]
    assert sorted(stored) == list(range(64)), "each is kept once"
    assert rates[1][1] >= 0.85 * 64, rates
    assert [hits for _, hits in rates[3:]] == [64, 64]
    one = rate(Simulated(0.005), depth=depth)
    assert rates[4][0] >= 0.99 * one, "replayed by all of them at least as fast as by one"


def test_a_daemon_more_keeps_what_it_takes_over_and_the_others_keep_theirs() -> None:
    def homes(count: int) -> dict[int, int]:
        pool = keepers(*[0.07] * count)
        Run(pool, 2, keeping="home", step_s=1.0).take(128)
        return {index: place for place, daemon in enumerate(pool) for index in daemon.kept}

    two, three = homes(2), homes(3)
    moved = {index for index in two if three[index] != two[index]}
    assert all(three[index] == 2 for index in moved)
    assert 64 / 3 / 2 < len(moved) < 64 / 3 * 2


def test_while_a_home_is_down_its_batches_are_made_elsewhere_and_not_kept() -> None:
    pool = keepers(0.07, 0.07)
    run = Run(pool, 2, keeping="home")
    run.take(192)
    kept = [set(daemon.kept) for daemon in pool]
    run.lose(0)
    run.take(64)
    assert [daemon.kept for daemon in pool] == kept
    run.open(0)
    run.take(64)
    hits = sum(daemon.hits for daemon in pool)
    run.take(64)
    assert [daemon.kept for daemon in pool] == kept
    assert sum(daemon.hits for daemon in pool) - hits == 64


def test_a_home_that_is_far_slower_is_left_alone() -> None:
    pool = keepers(0.01, 1.0)
    run = Run(pool, 2, keeping="home")
    run.take(64)
    assert run.take(256) >= rate(Simulated(0.01), depth=2)
    assert len(pool[1].kept) <= 3, "what made its pace known"


def test_states_that_nobody_asks_for_again_are_kept_nowhere() -> None:
    pool = keepers(0.01, 0.01)
    Run(pool, 2, keeping="nowhere").take(64)
    assert not any(daemon.kept for daemon in pool)


def test_both_that_stop_go_on_where_they_were() -> None:
    run = Run([Simulated(0.01, stopped=(1.0, 20.0)), Simulated(0.02, stopped=(1.0, 30.0))], depth=4)
    run.take(1000)
    assert run.take(200) > 90
