"""Pace: what is measured of one daemon's answers, and when one is late."""

from __future__ import annotations

import pytest

from specd.client.pace import IDLE_S, LATE, LATE_S, RECENT, Pace


def shown(*seconds: float, tokens: int = 10, share: float = 0.0) -> Pace:
    """A daemon that was asked for batches one by one, from second 0 on, and took so long for each."""
    pace, now = Pace(), 0.0
    for seq, took in enumerate(seconds):
        pace.ask(seq, tokens, now)
        now += took
        pace.answer(seq, share, now)
        pace.fetch(seq, 0.0)
    return pace


def test_an_answer_costs_the_time_since_the_one_before_it() -> None:
    pace = Pace()
    for seq in range(4):
        pace.ask(seq, 10, 0.0)
    assert pace.waiting == 40
    for seq in range(3):
        pace.answer(seq, 0.0, 5.0 + seq)
        pace.fetch(seq, 0.0)
    assert pace.per_token == pytest.approx(0.1), "the first one waited longer"
    assert pace.finish(20, 7.0) == pytest.approx(3.0), "behind what it owes"
    assert pace.finish(20, 7.6) == pytest.approx(2.4), "of which some is done"
    assert pace.finish(20, 60.0) == pytest.approx(2.0)
    pace.answer(3, 0.0, 8.0)
    assert pace.waiting == 10, "it is not here before it is fetched"
    pace.fetch(3, 0.3)
    assert pace.finish(20, 9.0) == pytest.approx(2.0)


def test_a_pace_is_known_after_two_answers() -> None:
    pace = shown(9.0)
    assert not pace.known
    assert pace.per_token == 1.0
    pace = shown(9.0, 1.0)
    assert pace.known
    assert pace.per_token == pytest.approx(0.1)
    assert shown(1.0, 1.0, 20.0, 1.0).per_token == pytest.approx(0.1), "a pause explains one"
    assert shown(1.0, 20.0, 20.0, 1.0).per_token == pytest.approx(2.2 / 3)
    assert shown(*[3.0] * RECENT, *[1.0] * RECENT).per_token == pytest.approx(0.1), "only recent answers count"


def test_batches_of_one_forward_cost_their_share_and_slow_wires_their_transfer() -> None:
    assert shown(3.0, 0.0, 0.0, share=1.0).per_token == pytest.approx(0.1)
    pace = shown(1.0, 1.0)
    for seq in (7, 8):
        pace.ask(seq, 10, 2.0)
        pace.answer(seq, 0.0, 3.0)
        pace.fetch(seq, 5.0)
    assert pace.per_token == pytest.approx(5.0 / 30), "of four transfers three count"
    pace.fetch(99, 5.0)
    assert pace.waiting == 0


def test_what_was_kept_is_measured_apart_and_costs_what_it_takes_by_how_often_it_was() -> None:
    pace, now = Pace(), 0.0
    for seq, replayed in enumerate([False, False, True, True]):
        assert pace.cost(10, kept=True) == 10, "nothing is known of it"
        pace.ask(seq, 10, now, kept=not replayed)
        now += 0.1 if replayed else 1.0
        pace.answer(seq, 0.0, now, replayed=replayed)
        pace.fetch(seq, 0.0)
    assert pace.per_token == pytest.approx(0.1), "of a forward"
    assert pace.cost(10, kept=True) == 10, "none of those was, that it may have kept"
    for seq, replayed in enumerate([True, True, True, False], 4):
        pace.ask(seq, 10, now, kept=True)
        now += 0.1 if replayed else 1.0
        pace.answer(seq, 0.0, now, replayed=replayed)
        pace.fetch(seq, 0.0)
    assert pace.cost(10, kept=True) == pytest.approx(10 * (0.5 + 0.5 * 0.1)), "three of six, at a tenth"
    assert pace.cost(10, kept=False) == 10
    pace.ask(8, 10, now, kept=True)
    assert pace.finish(10, now) == pytest.approx(0.55 + 1.0)


def test_what_was_kept_comes_beside_a_forward_which_is_not_shortened_by_it() -> None:
    pace = shown(1.0, 1.0)
    pace.ask(7, 10, 2.0)
    pace.ask(8, 10, 2.0, kept=True)
    pace.answer(8, 0.0, 2.9, replayed=True)
    pace.answer(7, 0.0, 3.0)
    assert pace.per_token == pytest.approx(0.1)


def test_a_daemon_that_had_kept_all_is_known_and_its_forwards_are_not() -> None:
    pace = Pace()
    for seq in range(3):
        pace.ask(seq, 10, seq * 1.0, kept=True)
        pace.answer(seq, 0.0, seq + 0.5, replayed=True)
        pace.fetch(seq, 0.1)
    assert pace.known
    assert pace.finish(pace.cost(10, kept=True), 3.0) == pytest.approx(0.5)
    assert pace.finish(pace.cost(10, kept=False), 3.0) == 10.0, "a second a token until one was made"
    pace.ask(9, 10, 3.0, kept=True)
    assert (pace.late(3.0 + LATE * 0.5 - 0.1), pace.late(3.0 + LATE * 0.5 + 0.1)) == (False, True)
    assert Pace().cost(10, kept=True) == 10
    assert shown(0.0, 0.0).cost(10, kept=True) == 10, "what takes no time"


def test_an_answer_is_late_after_some_times_its_usual_time_but_not_soon() -> None:
    pace = shown(0.01, 0.01)
    assert (pace.late(100.0), pace.silence(100.0)) == (False, 0.0), "it owes nothing"
    pace.ask(7, 10, 1.0)
    pace.ask(8, 1000, 2.0)
    assert pace.silence(2.5) == pytest.approx(1.5)
    assert (pace.late(1.0 + LATE_S), pace.late(1.1 + LATE_S)) == (False, True)
    pace.answer(7, 0.0, 4.0)
    assert pace.silence(4.5) == pytest.approx(0.5), "it has gone on"
    pace = shown(3.0, 3.0)
    pace.ask(7, 20, 10.0)
    assert (pace.late(9.9 + LATE * 6), pace.late(10.1 + LATE * 6)) == (False, True), "a batch twice as long"
    pace = Pace()
    pace.ask(1, 10, 1.0)
    assert (pace.late(1.0 + LATE_S), pace.late(1.1 + LATE_S)) == (False, True), "nothing is usual yet"


def test_a_transfer_stalls_after_some_times_its_usual_time() -> None:
    assert not shown(1.0, 1.0).stalls(1e6, 10), "nothing was transferred that took any time"
    pace = shown(1.0, 1.0)
    for seq in (7, 8):
        pace.ask(seq, 10, 2.0)
        pace.answer(seq, 0.0, 3.0)
        pace.fetch(seq, 3.0)
    usual = 3.0 / 30
    assert (pace.stalls(LATE * usual * 30 - 0.1, 30), pace.stalls(LATE * usual * 30 + 0.1, 30)) == (False, True)


def test_a_daemon_is_due_until_it_is_known_and_then_when_it_was_idle() -> None:
    least, most = IDLE_S
    pace = Pace()
    assert pace.due(0.0)
    pace.ask(0, 10, 0.0)
    assert not pace.due(1e6), "it owes an answer"
    pace.answer(0, 0.0, 30.0)
    assert not pace.due(30.0), "it is not fetched"
    pace.forget(0, 30.0)
    assert pace.due(30.0), "the first forward may have compiled"
    for took, wait in ((0.01, least), (1.0, 20.0), (100.0, most)):
        pace = shown(took, took)
        answered = 2 * took
        assert (pace.due(answered + wait - 0.01), pace.due(answered + wait + 0.01)) == (False, True), took
    pace = Pace()
    pace.ask(0, 10, 0.0)
    pace.forget(0, 5.0)
    assert (pace.due(5.0 + least / 2), pace.due(5.0 + least)) == (False, True), "a refusal is no hurry"


def test_what_was_measured_before_it_was_idle_counts_for_nothing() -> None:
    pace = shown(*[1.0] * RECENT)
    pace.ask(100, 10, 100.0)
    pace.answer(100, 0.0, 100.1)
    assert pace.per_token == pytest.approx(0.01)
    assert pace.known
    pace = shown(*[1.0] * RECENT)
    pace.ask(100, 10, 9.0)
    pace.answer(100, 0.0, 200.0)
    assert pace.per_token == pytest.approx(0.1), "it was not idle but slow, once"
