"""The arithmetic of disaggregation against co-location: who starves, what balances, and when it is not worth it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specd.errors import ConfigError
from specd.plan.balance import EVEN, MOST_PROCESSES, Work, balance

EQUAL = Work(target_tokens_per_s=50_000, draft_tokens_per_s=50_000, batch_tokens=3000, bytes_per_token=20_480)


def with_(work: Work = EQUAL, **changes: float | dict[int, float]) -> Work:
    return msgspec.structs.replace(work, **changes)


def test_equal_sides_are_balanced_and_cost_what_co_location_costs() -> None:
    found = balance(with_(samples=6000, epochs=2))
    assert (found.target_s, found.draft_s, found.wire_s) == (0.06, 0.06, 0.0)
    assert (found.starves, found.daemons_per_trainer, found.better) == ("none", 1.0, "equal")
    assert (found.balanced.daemons, found.balanced.trainers, found.balanced.gpus) == (1, 1, 2)
    assert found.balanced.gpu_s_per_sample == pytest.approx(found.colocated.gpu_s_per_sample)
    assert found.balanced.hours == pytest.approx(6000 * 2 * 0.06 / 3600)
    assert found.colocated.hours == pytest.approx(2 * found.balanced.hours)
    assert found.data_parallel.hours == pytest.approx(found.balanced.hours)
    assert found.colocated.gpu_hours == pytest.approx(found.balanced.gpu_hours)


def test_the_side_that_waits_starves_and_the_other_is_multiplied() -> None:
    slow_target = balance(with_(target_tokens_per_s=25_000))
    assert (slow_target.starves, slow_target.daemons_per_trainer) == ("draft", 2.0)
    assert (slow_target.balanced.daemons, slow_target.balanced.trainers) == (2, 1)
    slow_draft = balance(with_(draft_tokens_per_s=10_000))
    assert (slow_draft.starves, slow_draft.daemons_per_trainer) == ("target", 0.2)
    assert (slow_draft.balanced.daemons, slow_draft.balanced.trainers) == (1, 5)


def test_a_wire_slower_than_both_sides_is_what_they_wait_for() -> None:
    found = balance(with_(wire_gb_per_s=0.5))
    assert found.starves == "wire"
    assert found.one_to_one.batch_s == pytest.approx(3000 * 20_480 / 0.5e9)
    assert any("the wire needs 122.9 ms" in reason for reason in found.why)


def test_co_location_is_called_better_where_a_side_idles() -> None:
    # Ten daemons would balance one trainer: more than are considered.
    found = balance(with_(target_tokens_per_s=5_000))
    assert found.better == "co-located"
    assert found.why[0].startswith("co-location is the better choice")
    assert any("the trainers' GPUs idle" in reason for reason in found.why)
    assert any("do not fit in one GPU together" in reason for reason in found.why)


def test_merging_is_what_makes_a_daemon_pay() -> None:
    found = balance(with_(batch_tokens=512, target_tokens_per_s=82_800, colocated_target_tokens_per_s=7_500))
    assert found.better == "disaggregated"
    assert found.colocated.gpu_s_per_sample == pytest.approx(512 / 7_500 + 512 / 50_000)
    assert found.balanced.gpu_s_per_sample < 0.3 * found.colocated.gpu_s_per_sample
    assert any("only merges batches that wait" in reason for reason in found.why)
    assert not any("was taken to be as fast" in reason for reason in found.why)


def test_ring_and_sample_follow_from_depth_and_lengths() -> None:
    found = balance(with_(tokens_per_sample=1000, depth=4))
    assert found.bytes_per_sample == 20_480_000
    assert (found.ring.slots, found.ring.slot_bytes) == (5, 61_440_000)
    assert found.ring.nbytes == 5 * 61_440_000
    assert found.balanced.samples_per_s == pytest.approx(3 / 0.06)


def test_tensor_parallel_targets_take_their_gpus() -> None:
    found = balance(with_(gpus_per_daemon=2))
    assert (found.one_to_one.gpus, found.colocated.gpus) == (3, 2)
    # Two GPUs that run the target together and then the draft on both.
    assert found.colocated.batch_s == pytest.approx(0.06 + 0.03)


def test_a_placement_that_is_asked_for_is_judged_and_not_the_best_one() -> None:
    """Two servers and a trainer: 2.37 times one co-located GPU, and yet less than three of them."""
    work = with_(target_tokens_per_s=3000 / 0.152, draft_tokens_per_s=3000 / 0.111)
    found = balance(work, 2, 1)
    assert found.asked is not None
    assert (found.asked.name, found.asked.gpus, found.data_parallel.gpus) == ("2 : 1", 3, 3)
    assert found.asked.over_one == pytest.approx(2.37, abs=0.01)
    assert found.asked.over_parallel == pytest.approx(0.79, abs=0.01)
    assert found.better == "co-located"
    assert "2 : 1 takes 1.27 × its GPU time" in found.why[0]
    assert balance(work).asked is None


def test_co_location_is_left_exactly_where_a_lone_batch_takes_longer() -> None:
    work = with_(target_tokens_per_s=25_000)
    found = balance(work, 1, 3)
    for factor, better in ((0.9, "co-located"), (1.1, "disaggregated")):
        alone = 3000 / (found.pays_from_s * factor)
        assert balance(with_(work, colocated_target_tokens_per_s=alone), 1, 3).better == better
    assert found.ring.slots == 9


def test_what_co_location_was_measured_to_take_decides() -> None:
    """A forward and a step that fill each other's gaps, on one GPU and on two."""
    apart = with_(
        batch_tokens=3072, target_tokens_per_s=3072 / 0.0543, draft_tokens_per_s=3072 / 0.054,
        colocated_target_tokens_per_s=3072 / 0.0612,
    )  # fmt: skip
    guessed = balance(apart)
    assert (guessed.better, guessed.overlapped) == ("disaggregated", 1.0)
    assert any("one after the other, 115.2 ms of GPU time a batch" in reason for reason in guessed.why)
    assert any("under 108.6 ms it is the better choice: measure it" in reason for reason in guessed.why)
    found = balance(with_(apart, colocated_tokens_per_s={1: 3072 / 0.0916, 2: 3072 / 0.051}, efficiency=0.5))
    assert found.colocated.batch_s == pytest.approx(0.0916)
    assert found.data_parallel.batch_s == pytest.approx(0.051)
    assert found.one_to_one.batch_s == pytest.approx(2 * 0.0543)
    assert found.one_to_one.over_one == pytest.approx(0.0916 / (2 * 0.0543))
    assert found.one_to_one.over_parallel == pytest.approx(0.051 / (2 * 0.0543))
    assert (found.better, found.pays_from_s) == ("co-located", 0.0)
    assert found.overlapped == pytest.approx(0.0916 / 0.1152)
    assert not any("measure it" in reason for reason in found.why)


@pytest.mark.parametrize(("placement", "seconds"), [((1, 1), 0.05), ((1, 3), 0.03), ((2, 6), 0.015)])
def test_more_gpus_than_were_measured_are_as_fast_as_the_most(placement: tuple[int, int], seconds: float) -> None:
    """One takes 0.1 s a batch, four take 0.03: two are two of the one, eight twice the four."""
    measured = {1: 3000 / 0.1, 4: 3000 / 0.03}
    found = balance(with_(colocated_tokens_per_s=measured), *placement)
    assert found.data_parallel.batch_s == pytest.approx(seconds)


@pytest.mark.parametrize("asked", [(0, 2), (2, 0), (-1, 1)])
def test_half_a_placement_is_refused(asked: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"--daemons -?\d --trainers \d: expected both"):
        balance(EQUAL, *asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_tokens_per_s": 0}, "--target-tokens-per-s 0: expected a number, more than 0"),
        ({"draft_tokens_per_s": -1}, "--draft-tokens-per-s -1"),
        ({"target_tokens_per_s": float("inf")}, "--target-tokens-per-s inf"),
        ({"gpus_per_daemon": 0}, "--gpus-per-daemon 0: expected a number, at least 1"),
        ({"wire_gb_per_s": -2}, "--wire-gb-per-s -2: expected a number, 0 or more"),
        ({"tokens_per_sample": 4000}, "a sample has to fit in a batch"),
        ({"colocated_target_tokens_per_s": 60_000}, "it runs the same forwards"),
        ({"colocated_tokens_per_s": {1: 0.0}}, "--colocated-tokens-per-s 0 on 1 GPUs: expected a number, more than 0"),
        ({"efficiency": 0.0}, "an efficiency of 0: expected a number, more than 0"),
    ],
)
def test_impossible_work_is_refused_by_name(changes: dict[str, float | dict[int, float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        balance(with_(EQUAL, **changes))


RATES = st.floats(10.0, 1e6)


@given(target=RATES, draft=RATES, wire=st.sampled_from([0.0, 0.01, 1.0, 300.0]), gpus=st.integers(1, 4))
def test_no_placement_beats_co_location_without_merging(target: float, draft: float, wire: float, gpus: int) -> None:
    found = balance(
        with_(target_tokens_per_s=target, draft_tokens_per_s=draft, wire_gb_per_s=wire, gpus_per_daemon=gpus)
    )
    assert found.better != "disaggregated"
    assert found.balanced.gpu_s_per_sample >= found.colocated.gpu_s_per_sample * (1 - 1e-9)
    assert found.balanced.gpu_s_per_sample <= found.one_to_one.gpu_s_per_sample * (1 + EVEN)
    assert found.balanced.daemons + found.balanced.trainers <= MOST_PROCESSES
