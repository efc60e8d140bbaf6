"""A draft vocabulary: the tokens that a draft can guess, and their place in the target's vocabulary.

Shape legend: V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from specd.errors import ConfigError

LEAST_COVERED = 0.5
"""Share of the labels that a draft vocabulary has to hold."""


def draft_vocabulary(counts: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The `size` most frequent tokens, in ascending order, int64 [D]; among equals the smaller id.

    counts: how often each token is a label, [V]. Where fewer occur the smallest other ids fill up.
    Raises ConfigError when they cover less than half of all labels, or `size` exceeds V.
    """
    if size > counts.size:
        raise ConfigError(f"draft.draft_vocab_size={size}: expected at most the target's {counts.size} tokens, or 0")
    chosen = np.sort(np.argsort(-counts, kind="stable")[:size])
    check_covered(counts, chosen, f"draft.draft_vocab_size={size}")
    return chosen


def check_covered(counts: NDArray[np.int64], chosen: NDArray[np.int64], what: str) -> None:
    """Raise ConfigError where `chosen` tokens cover less than half of all labels. what: chose them, for the message."""
    if (share := covered(counts, chosen)) < LEAST_COVERED:
        raise ConfigError(
            f"{what} covers {share:.0%} of the labels: expected at least {LEAST_COVERED:.0%}; give a larger "
            f"draft.draft_vocab_size, or 0 for the target's whole vocabulary"
        )


def covered(counts: NDArray[np.int64], chosen: NDArray[np.int64]) -> float:
    """Share of the labels that are `chosen` tokens; 1 where there are no labels."""
    total = int(counts.sum())
    return int(counts[chosen].sum()) / total if total else 1.0
