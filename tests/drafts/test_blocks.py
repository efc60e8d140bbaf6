"""Anchors and blocks: where they may stand, what they depend on, and what they have to predict."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from drafts import (
    MASK,
)
from specd.drafts.blocks import make_blocks, sample_anchors
from specd.protocol.batch import Batch


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=30), min_size=1, max_size=6), st.integers(1, 8))
def test_anchors_are_legal_distinct_and_as_many_as_there_can_be(masks: list[list[bool]], num_anchors: int) -> None:
    lengths = np.array([len(mask) for mask in masks], np.int32)
    flat = np.concatenate([np.array(mask) for mask in masks])
    chosen = sample_anchors(flat, lengths, tuple(range(len(masks))), 0, 0, num_anchors)
    for mask, anchors in zip(masks, chosen, strict=True):
        legal = [p for p in range(len(mask) - 1) if mask[p] and mask[p + 1]]
        assert set(anchors) <= set(legal)
        assert len(anchors) == len(set(anchors)) == min(num_anchors, len(legal))
        assert list(anchors) == sorted(anchors)


def test_anchors_depend_on_seed_epoch_and_sample_only() -> None:
    one = np.ones(40, np.bool_)
    lengths = np.array([40], np.int32)
    alone = sample_anchors(one, lengths, (7,), 3, 5, 6)[0]
    packed = sample_anchors(np.tile(one, 3), np.repeat(lengths, 3), (9, 7, 8), 3, 5, 6)
    assert np.array_equal(packed[1], alone)
    assert not np.array_equal(packed[0], alone)
    assert not np.array_equal(sample_anchors(one, lengths, (7,), 4, 5, 6)[0], alone)
    assert not np.array_equal(sample_anchors(one, lengths, (7,), 3, 6, 6)[0], alone)


def test_anchors_are_drawn_evenly() -> None:
    counts = np.zeros(9)
    for epoch in range(600):
        counts[sample_anchors(np.ones(10, np.bool_), np.array([10], np.int32), (0,), epoch, 0, 3)[0]] += 1
    assert counts.min() > 150
    assert counts.max() < 250


def test_blocks_predict_inside_their_sequence_and_under_the_loss_mask() -> None:
    tokens = np.arange(10, 20, dtype=np.int32)
    mask = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 1], np.bool_)
    batch = Batch(tokens=tokens, lengths=np.array([6, 4], np.int32), loss_mask=mask, samples=(0, 1))
    blocks = make_blocks(batch, [np.array([0, 4]), np.array([1])], 4, MASK, decay=2.0)
    assert blocks.tokens.tolist() == [10, 3, 3, 3, 14, 3, 3, 3, 17, 3, 3, 3]
    assert blocks.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4]
    assert blocks.context_positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    # Block 0 skips the masked token 12; block 1 ends with its sequence; block 2 with the batch.
    assert blocks.rows.tolist() == [1, 3, 5, 9, 10]
    assert blocks.labels.tolist() == [11, 13, 15, 18, 19]
    assert batch.tokens[blocks.before].tolist() == [10, 12, 14, 17, 18]
    all_guess = make_blocks(batch, [np.array([0, 4]), np.array([1])], 3, MASK, decay=2.0, first=0)
    assert all_guess.labels.tolist() == [11, 13, 15, 18, 19]
    assert batch.tokens[all_guess.before].tolist() == [10, 12, 14, 17, 18]
    assert np.allclose(blocks.weights, [1.0, math.exp(-1.0), 1.0, 1.0, math.exp(-0.5)])
    assert np.array_equal(make_blocks(batch, [np.array([0])] * 2, 4, MASK, decay=0.0).weights, np.ones(5))
