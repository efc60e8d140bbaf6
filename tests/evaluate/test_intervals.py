"""Intervals of acceptance: as wide as they should be, paired where prompts are, and absent where nothing is known."""

from __future__ import annotations

import numpy as np
import pytest

from specd.evaluate import intervals
from specd.evaluate.results import PromptResult


def prompt(tokens: int, forwards: int, drafted: tuple[int, ...] = (), accepted: tuple[int, ...] = ()) -> PromptResult:
    return PromptResult(
        prompt_tokens=5,
        new_tokens=tokens + 1,
        forwards=forwards,
        acceptance_length=tokens / max(forwards, 1),
        identical=True,
        seconds=1.0,
        greedy_seconds=1.0,
        drafted=drafted,
        accepted=accepted,
    )


def test_an_interval_of_the_mean_is_as_wide_as_theory_says() -> None:
    """With equally long texts the acceptance length is a mean, whose standard error is known."""
    tokens = np.random.default_rng(1).poisson(200, 200)
    rows = [prompt(int(count), 100) for count in tokens]
    mean = tokens.mean() / 100
    error = tokens.std() / 100 / np.sqrt(200)
    found = intervals.acceptance_length(rows)
    assert found == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.3 * error)
    assert found == intervals.acceptance_length(rows), "always the same"


def test_long_texts_count_more() -> None:
    low, high = intervals.acceptance_length([prompt(1000, 250), *[prompt(10, 10)] * 20]) or (0, 0)
    assert (low, high) == pytest.approx((1.0, 3.4), abs=0.2), "one text decides, which may be drawn several times"


def test_a_gain_is_seen_through_prompts_that_differ() -> None:
    tokens = np.random.default_rng(2).integers(100, 400, 40)
    before = [prompt(int(count), 100) for count in tokens]
    after = [prompt(int(count) + 10, 100) for count in tokens]
    assert intervals.acceptance_gain(before, after) == pytest.approx((0.1, 0.1))
    low, high = intervals.acceptance_length(before) or (0, 0)
    assert high - low > 0.2, "unpaired, the gain would drown"


def test_offsets_have_an_interval_each() -> None:
    rows = [prompt(10, 10, (10, 8), (int(10 * share), 0)) for share in (0.2, 0.4, 0.6, 0.8) * 5]
    (low, high), last = intervals.acceptance_by_offset(rows)
    assert 0.35 < low < 0.5 < high < 0.65
    assert last == (0.0, 0.0)


@pytest.mark.parametrize("rows", [[], [prompt(10, 5)], [prompt(10, 5), prompt(0, 0)]])
def test_one_text_has_no_interval(rows: list[PromptResult]) -> None:
    assert intervals.acceptance_length(rows) is None
    assert intervals.acceptance_gain(rows, rows) is None
    assert intervals.acceptance_by_offset(rows) == ()
