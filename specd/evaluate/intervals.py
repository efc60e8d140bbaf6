"""How sure an evaluation is: 95 % intervals by resampling its prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specd.evaluate.results import PromptResult

RESAMPLES, SEED = 2000, 0
COVERAGE = (2.5, 97.5)
"""Percentiles of the resampled values."""
FEW = 10
"""With fewer prompts than these an interval is too narrow: so few texts do not show how much texts differ."""

Interval = tuple[float, float]


def acceptance_length(prompts: Sequence[PromptResult]) -> Interval | None:
    """Of the acceptance length over all prompts; None where fewer than two of them took a forward."""
    tokens, forwards = _counts(prompts)
    if np.count_nonzero(forwards) < 2:
        return None
    return _percentiles([tokens[drawn].sum() / max(forwards[drawn].sum(), 1) for drawn in _draws(len(prompts))])


def said(prompts: Sequence[PromptResult]) -> str:
    """The interval of the acceptance length in words, empty where there is none."""
    found = acceptance_length(prompts)
    few = f", of only {len(prompts)} prompts" if len(prompts) < FEW else ""
    return f"95 %: {found[0]:.2f} to {found[1]:.2f}{few}" if found else ""


def acceptance_gain(before: Sequence[PromptResult], after: Sequence[PromptResult]) -> Interval | None:
    """Of the second acceptance length minus the first, on the same prompts in the same order.

    Pairs are drawn together: what makes a prompt easy for both cancels.
    """
    (first, first_forwards), (second, second_forwards) = _counts(before), _counts(after)
    if np.count_nonzero(first_forwards * second_forwards) < 2:
        return None
    return _percentiles(
        [
            second[drawn].sum() / max(second_forwards[drawn].sum(), 1)
            - first[drawn].sum() / max(first_forwards[drawn].sum(), 1)
            for drawn in _draws(len(before))
        ]
    )


def acceptance_by_offset(prompts: Sequence[PromptResult]) -> tuple[Interval, ...]:
    """Of the share accepted at each offset; empty for evaluations that kept no counts by prompt."""
    if len(prompts) < 2 or not all(row.drafted for row in prompts):
        return ()
    drafted, accepted = (np.array([getattr(row, name) for row in prompts]) for name in ("drafted", "accepted"))
    shares = [accepted[drawn].sum(0) / np.maximum(drafted[drawn].sum(0), 1) for drawn in _draws(len(prompts))]
    low, high = np.percentile(shares, COVERAGE, axis=0)
    return tuple(zip(low.tolist(), high.tolist(), strict=True))


def _counts(prompts: Sequence[PromptResult]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens after the first, and target forwards, of each prompt."""
    tokens = np.array([row.new_tokens - 1 for row in prompts], np.int64)
    return tokens, np.array([row.forwards for row in prompts], np.int64)


def _draws(count: int) -> list[NDArray[np.int64]]:
    """RESAMPLES times as many prompts as there are, with replacement; always the same ones."""
    generator = np.random.default_rng(SEED)
    return [generator.integers(0, count, count) for _ in range(RESAMPLES)]


def _percentiles(values: Sequence[float]) -> Interval:
    low, high = np.percentile(values, COVERAGE)
    return float(low), float(high)
