"""Dispatch: suspects run alone, poison is found and no other batch is blamed, a hung worker is noticed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specd.daemon.dispatch import DEATHS, REMEMBERED, Dispatch, Fill


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def fill(slot: int, content: bytes | None = None, generation: int = 1) -> Fill[str]:
    return Fill(slot, generation, content or b"%d" % slot, f"task {slot}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def dispatch(clock: Clock) -> Dispatch[str]:
    return Dispatch(60.0, clock)


def slots(fills: list[Fill[str]]) -> list[int]:
    return [each.slot for each in fills]


def test_everything_is_sent_at_once_and_in_order(dispatch: Dispatch[str]) -> None:
    for slot in (3, 1, 2):
        dispatch.add(fill(slot))
    assert slots(dispatch.next()) == [3, 1, 2]
    assert dispatch.next() == []


def test_what_ran_when_the_worker_died_runs_alone_and_is_cleared_by_its_end(dispatch: Dispatch[str]) -> None:
    for slot in (1, 2):
        dispatch.add(fill(slot))
    dispatch.next()
    dispatch.died()
    for slot in (3, 1, 2, 4):
        dispatch.add(fill(slot))
    assert slots(dispatch.next()) == [3]  # 1 is a suspect, and waits for the worker to be idle
    dispatch.done(3, 1)
    assert slots(dispatch.next()) == [1]
    assert dispatch.next() == []
    dispatch.done(1, 1)
    assert slots(dispatch.next()) == [2]
    dispatch.done(2, 1)
    for slot in (1, 2):
        dispatch.add(fill(slot, generation=2))
    assert slots(dispatch.next()) == [4, 1, 2]


def test_only_what_died_alone_twice_is_poison(dispatch: Dispatch[str]) -> None:
    for slot in (1, 2):
        dispatch.add(fill(slot))
    dispatch.next()
    dispatch.died()
    for _ in range(DEATHS):
        assert dispatch.poison(b"1") is dispatch.poison(b"2") is None
        dispatch.add(fill(1))
        dispatch.add(fill(2))
        assert slots(dispatch.next()) == [1]
        dispatch.died()
    assert "2 times" in (dispatch.poison(b"1") or "")
    assert dispatch.poison(b"2") is None
    dispatch.add(fill(2))
    dispatch.next()
    dispatch.done(2, 1)
    assert "2 times" in (dispatch.poison(b"1") or ""), "another's end does not clear it"


def test_a_death_without_fills_blames_nobody_and_waiting_fills_are_no_suspects(dispatch: Dispatch[str]) -> None:
    dispatch.died()
    dispatch.add(fill(1))
    dispatch.died()
    dispatch.add(fill(1))
    dispatch.add(fill(2))
    assert slots(dispatch.next()) == [1, 2]


def test_few_suspects_are_remembered(dispatch: Dispatch[str]) -> None:
    for number in range(REMEMBERED + 5):
        dispatch.add(fill(1, b"%d" % number))
        dispatch.next()
        dispatch.died()
    assert str(REMEMBERED) in repr(dispatch)


def test_a_stale_report_changes_nothing(dispatch: Dispatch[str], clock: Clock) -> None:
    dispatch.add(fill(1))
    dispatch.next()
    clock.now += 5
    hung = dispatch.hung_at()
    dispatch.done(1, 7)
    dispatch.done(2, 1)
    assert dispatch.hung_at() == hung


def test_the_first_fill_of_a_life_may_compile(dispatch: Dispatch[str], clock: Clock) -> None:
    assert dispatch.hung_at() is None
    dispatch.started(3.0)
    dispatch.add(fill(1))
    dispatch.next()
    assert dispatch.hung_at() == clock.now + 600
    dispatch.started(90.0)
    assert dispatch.hung_at() == clock.now + 900
    clock.now += 30
    dispatch.done(1, 1)
    assert dispatch.hung_at() is None


def test_a_worker_is_hung_when_it_has_finished_nothing_for_long(dispatch: Dispatch[str], clock: Clock) -> None:
    for slot in range(6):
        dispatch.add(fill(slot))
    dispatch.next()
    for slot in range(5):
        clock.now += 4
        dispatch.done(slot, 1)
    assert dispatch.hung_at() == clock.now + 80  # 20 medians of 4 s, however long the last one has waited for its turn
    dispatch.died()
    dispatch.add(fill(1))
    dispatch.next()
    assert dispatch.hung_at() == clock.now + 600, "another life begins with its first fill"


def test_fills_that_end_with_others_do_not_shorten_the_limit(dispatch: Dispatch[str], clock: Clock) -> None:
    for _ in range(5):
        for slot in range(8):
            dispatch.add(fill(slot))
        dispatch.next()
        clock.now += 70
        for slot in range(8):
            dispatch.done(slot, 1)
    assert dispatch.limit_s == 20 * 70


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.sets(st.integers(0, 5), max_size=2), st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_exactly_the_poison_fails_whatever_is_asked_for_with_it(
    poison: set[int], wanted: list[int], data: st.DataObject
) -> None:
    """Trainers ask again for what a death took from them; the worker dies of poison, also beside others."""
    dispatch: Dispatch[str] = Dispatch(60.0, Clock())
    todo, filled, failed = list(dict.fromkeys(wanted)), set(), set()
    deaths = 0
    while todo:
        assert deaths <= 3 * len(poison), "each poison kills at most once among others and twice alone"
        for number in data.draw(st.permutations(todo)):
            if dispatch.poison(b"%d" % number):
                failed.add(number)
                todo.remove(number)
            else:
                dispatch.add(fill(number, b"%d" % number))
        while running := dispatch.next():
            if poison & set(slots(running)):
                dispatch.died()
                deaths += 1
                break
            for number in slots(running):
                dispatch.done(number, 1)
                filled.add(number)
                todo.remove(number)
    assert failed == poison & set(wanted)
    assert filled == set(wanted) - poison
