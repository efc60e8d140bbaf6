"""One pass over a chunk of logits: loss, whether it was right, and the gradient written where the logits were.

Needs triton, so it is imported only where there is a GPU. Shape legend: R rows, V vocabulary.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

LANES, EACH, WARPS = 512, 16, 16
"""A row is read in strips of LANES × EACH logits; each lane keeps its own maximum, so a strip needs no barrier."""


@triton.jit  # type: ignore[untyped-decorator]
def _score(  # type: ignore[no-untyped-def] # triton reads annotations as code
    logits,
    labels,
    weights,
    losses,
    correct,
    stride,
    VOCAB: tl.constexpr,
    GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    own = tl.load(logits + label).to(tl.float32)
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]

    # Finite, so that a lane beyond a small vocabulary never subtracts two infinities.
    top = tl.full((LANES,), -1e30, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for begin in range(0, VOCAB, LANES * EACH):
        index = begin + columns
        scores = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
        top = higher
    peak = tl.max(top, 0)
    mass = tl.sum(total * tl.exp(top - peak), 0)
    tl.store(losses + row, tl.log(mass) + peak - own)
    tl.store(correct + row, own >= peak)

    if GRADIENT:
        weight = tl.load(weights + row)
        scale = weight / mass
        # Back from the end of the row, which is still in the cache.
        last = (VOCAB - 1) // (LANES * EACH) * (LANES * EACH)
        for back in range(0, VOCAB, LANES * EACH):
            index = last - back + columns
            scores = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(scores - peak) * scale
            # The label's entry before rounding to the logits' dtype, or a nearly right prediction would be lost in it.
            gradient = tl.where(index == label, gradient - weight, gradient)
            tl.store(logits + index, gradient.to(logits.dtype.element_ty), mask=index < VOCAB)


def score(logits: Tensor, labels: Tensor, weights: Tensor, losses: Tensor, correct: Tensor, gradient: bool) -> None:
    """Fill losses (float32 [R], unweighted) and correct (bool [R]) from logits [R, V] with contiguous rows.

    labels int64 [R], weights float32 [R]. With `gradient` the logits become weight · (softmax − one-hot).
    """
    num_rows, vocab = logits.shape
    with torch.cuda.device(logits.get_device()):
        _score[(num_rows,)](
            logits,
            labels,
            weights,
            losses,
            correct,
            logits.stride(0),
            VOCAB=vocab,
            GRADIENT=gradient,
            LANES=LANES,
            EACH=EACH,
            num_warps=WARPS,
        )
