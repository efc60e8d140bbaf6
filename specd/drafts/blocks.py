"""Anchors and blocks: which tokens a block draft is shown, and which it has to predict.

Shape legend: T tokens of a batch, B sequences, M blocks, b tokens a block, R predictions that count.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.drafts.block_attention import BlockLayout
from specd.protocol.batch import Batch


class Blocks(msgspec.Struct, frozen=True, kw_only=True):
    """The blocks of one batch on the host: what goes in, what should come out.

    tokens, positions: int64 [M·b], input ids (anchor, then masks) and positions within the sequence. context_positions:
    int64 [T]. rows: int64 [R], ascending indices into the M·b block tokens whose prediction counts; labels, offsets:
    int64 [R], the token each should predict and how far that is behind the anchor, from 1. weights: float32 [R], all
    positive.
    """

    layout: BlockLayout
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    context_positions: NDArray[np.int64]
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def before(self) -> NDArray[np.int64]:
        """Of each prediction the token before its label, int64 [R], as an index into the batch.

        Serving knows the tokens up to it, and the target's state there predicts the label.
        """
        anchors: NDArray[np.int64] = self.layout.anchors[self.rows // self.layout.block_size]
        return anchors + self.offsets - 1


def sample_anchors(
    loss_mask: NDArray[np.bool_],
    lengths: NDArray[np.int32],
    samples: tuple[int, ...],
    epoch: int,
    seed: int,
    num_anchors: int,
) -> list[NDArray[np.int64]]:
    """Per sequence up to `num_anchors` positions p, ascending and from its start, with loss_mask at p and p + 1.

    Drawn without replacement by a generator of (seed, epoch, sample id) alone, so the choice is the same whatever
    batch, order, rank or resumed run the sample comes in. loss_mask: bool [T]. lengths: [B]. samples: B ids.
    """
    chosen = []
    for mask, sample in zip(np.split(loss_mask, np.cumsum(lengths)[:-1]), samples, strict=True):
        legal = np.flatnonzero(mask[:-1] & mask[1:])
        draws = np.random.default_rng([part % 2**64 for part in (seed, epoch, sample)]).random(legal.size)
        chosen.append(np.sort(legal[np.argsort(draws, kind="stable")[:num_anchors]]))
    return chosen


def make_blocks(
    batch: Batch,
    anchors: list[NDArray[np.int64]],
    block_size: int,
    mask_token_id: int,
    decay: float,
    *,
    first: int = 1,
    unbroken: bool = False,
) -> Blocks:
    """The blocks that start at `anchors` (per sequence, as from sample_anchors).

    Token j ≥ first of a block predicts token p + k, k = j + 1 − first, and weighs exp(−(k − 1) / decay) where p + k is
    inside the sequence and under the loss mask; `unbroken`: and so is every token from p + 1 on. Without any anchor
    there is one block that predicts nothing: its gradients are zeros, and a batch without labels takes the same path
    as every other.
    """
    ends = np.cumsum(batch.lengths, dtype=np.int64)
    begins = ends - batch.lengths
    if idle := not any(part.size for part in anchors):
        anchors = [np.zeros(1, np.int64), *anchors[1:]]
    counts = [part.size for part in anchors]
    starts, stops = np.repeat(begins, counts), np.repeat(ends, counts)
    places = starts + np.concatenate(anchors)
    steps = np.arange(block_size)

    tokens = np.full((places.size, block_size), mask_token_id, np.int64)
    tokens[:, 0] = batch.tokens[places]
    targets = places[:, None] + steps + 1 - first
    known = np.minimum(targets, batch.num_tokens - 1)
    counted = (targets < stops[:, None]) & batch.loss_mask[known] & (not idle)
    if unbroken:
        counted[:, first:] = np.logical_and.accumulate(counted[:, first:], axis=1)
    counted[:, :first] = False
    rows = np.flatnonzero(counted)
    offsets = rows % block_size + 1 - first
    weights = np.exp(-(offsets - 1) / decay) if decay else np.ones(rows.size)
    return Blocks(
        layout=BlockLayout(starts=starts, anchors=places, block_size=block_size, num_context=batch.num_tokens),
        tokens=tokens.reshape(-1),
        positions=((places - starts)[:, None] + steps).reshape(-1),
        context_positions=np.arange(batch.num_tokens) - np.repeat(begins, batch.lengths),
        rows=rows,
        labels=batch.tokens[known.reshape(-1)[rows]].astype(np.int64),
        offsets=offsets,
        weights=weights.astype(np.float32),
    )
