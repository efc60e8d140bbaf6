"""One pass over the logits of predictions that share teachers: loss, whether they are right, and their gradient.

Needs triton, so it is imported only where there is a GPU. Shape legend: C predictions, U teacher rows, W draft
vocabulary.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

LANES, EACH, WARPS = 512, 8, 8
"""A row is read in strips of LANES × EACH logits; each lane keeps its own maximum, so a strip needs no barrier."""


@triton.jit  # type: ignore[untyped-decorator]
def _score(  # type: ignore[no-untyped-def] # triton reads annotations as code
    logits,
    shares,
    teachers,
    places,
    weights,
    losses,
    right,
    stride,
    shares_stride,
    VOCAB: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    shares += tl.load(teachers + row) * shares_stride
    own = tl.load(logits + tl.load(places + row)).to(tl.float32)
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]

    # Finite, so that a lane beyond a small vocabulary never subtracts two infinities.
    top = tl.full((LANES,), -1e30, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    meant = tl.zeros((LANES,), tl.float32)
    for begin in range(0, VOCAB, LANES * EACH):
        index = begin + columns
        scores = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        target = tl.load(shares + index, mask=index < VOCAB, other=0.0)
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
        meant += tl.sum(target * tl.where(index < VOCAB, scores, 0.0), 1)
        top = higher
    peak = tl.max(top, 0)
    mass = tl.sum(total * tl.exp(top - peak), 0)
    tl.store(losses + row, tl.log(mass) + peak - tl.sum(meant, 0))
    tl.store(right + row, tl.where(own >= peak, 1.0, 0.0))

    weight = tl.load(weights + row)
    # Back from the end of the row, which is still in the cache.
    last = (VOCAB - 1) // (LANES * EACH) * (LANES * EACH)
    for back in range(0, VOCAB, LANES * EACH):
        index = last - back + columns
        scores = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        target = tl.load(shares + index, mask=index < VOCAB, other=0.0)
        gradient = (tl.exp(scores - peak) / mass - target) * weight
        tl.store(logits + index, gradient.to(logits.dtype.element_ty), mask=index < VOCAB)


def score(logits: Tensor, shares: Tensor, teachers: Tensor, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Losses, float32 [C], and 1 where a prediction is right, else 0; the logits [C, W] become their gradient.

    shares: the teachers' distributions over the draft vocabulary, float32 [U, W]. teachers: which is whose, int64 [C].
    places: of the teacher's best token in the draft vocabulary, int64 [C]. weights: of the gradient, float32 [C].
    """
    num_rows, vocab = logits.shape
    losses, right = torch.empty(2, num_rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device):
        _score[(num_rows,)](
            logits,
            shares,
            teachers,
            places,
            weights,
            losses,
            right,
            logits.stride(0),
            shares.stride(0),
            VOCAB=vocab,
            LANES=LANES,
            EACH=EACH,
            num_warps=WARPS,
        )
    return losses, right
