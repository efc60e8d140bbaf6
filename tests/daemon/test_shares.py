"""Runs that share: their union, and the credit by which one of them is held."""

from __future__ import annotations

import pytest

from rings import A, B, C, Clock
from specd.daemon.shares import Shares
from specd.protocol.capture import CaptureSpec

LOW, FINAL = CaptureSpec(taps=(1, 3)), CaptureSpec(taps=(), final=True)


def test_ranks_of_one_run_are_one_member() -> None:
    shares = Shares(Clock())
    first, second = (shares.enter(name, b"run", "s", LOW) for name in (A, B))
    assert first is second
    assert shares.others(first) == set()
    other = shares.enter(C, b"", "s", FINAL)
    assert shares.others(first) == {other}
    assert shares.held(first, LOW) == CaptureSpec(taps=(1, 3), final=True)
    assert not shares.leave(A, first)
    assert shares.leave(B, first)
    assert shares.others(other) == set()
    assert shares.held(other, FINAL) == FINAL


def test_nobody_shares_without_a_name() -> None:
    shares = Shares(Clock())
    first, _ = shares.enter(A, b"", "", LOW), shares.enter(B, b"", "", FINAL)
    assert shares.others(first) == set()
    assert shares.held(first, LOW) == LOW


def test_what_is_always_captured_is_captured_for_shares_alone_in_their_dtype() -> None:
    shares = Shares(Clock(), always=CaptureSpec(taps=(2,), final=True, dtype="float32"))
    alone, first = shares.enter(A, b"", "", LOW), shares.enter(B, b"", "s", LOW)
    assert shares.held(alone, LOW) == LOW
    assert shares.held(first, LOW) == CaptureSpec(taps=(1, 2, 3), final=True)
    assert shares.wanted("", LOW.dtype) == []
    assert shares.wanted("nobody", "float16") == [CaptureSpec(taps=(2,), final=True, dtype="float16")]


def test_the_pace_is_two_forwards_of_the_usual_batch() -> None:
    shares = Shares(Clock())
    assert shares.pace_s == 0
    for took in (60.0, 0.1, 0.2, 5.0):  # the first has compiled
        shares.measured(took)
    assert shares.pace_s == pytest.approx(0.4)


def test_over_any_leases_a_run_is_held_for_their_pace_and_the_cap() -> None:
    clock = Clock()
    shares = Shares(clock, pace_s=0.5)
    run = shares.enter(A, b"", "s", LOW)
    begin, leases = clock.now, 200
    for place in range(leases):
        shares.look()
        while shares.holds(run):
            clock.now = shares.dues()[0]
        shares.held_s()
        shares.leased(run, place)
    assert clock.now - begin == pytest.approx((leases - 1) * 0.5 + 8.0)


def test_a_pace_of_zero_never_holds() -> None:
    shares = Shares(Clock(), pace_s=0.0)
    run = shares.enter(A, b"", "s", LOW)
    shares.leased(run, 0)
    assert not shares.holds(run)
