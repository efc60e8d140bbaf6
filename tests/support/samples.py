"""Batches for tests."""

from __future__ import annotations

import numpy as np

from specd.protocol.batch import Batch


def batch(index: int, lengths: tuple[int, ...] = (5, 3), vocab_size: int = 128) -> Batch:
    """A batch of random tokens that depends on nothing but its arguments."""
    rng = np.random.default_rng([index, *lengths])
    total = sum(lengths)
    return Batch(
        tokens=rng.integers(0, vocab_size, total, dtype=np.int32),
        lengths=np.array(lengths, np.int32),
        loss_mask=np.ones(total, np.bool_),
        samples=tuple(range(len(lengths))),
        index=index,
    )
