"""A pass over logits and those of their teachers: entropy, distance, whether the label is best, and the gradient.

Needs triton, so it is imported only where there is a GPU. Shape legend: C predictions, U teachers, V vocabulary.
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
"""A row is read in parts of LANES × EACH logits; each lane keeps its own maxima, so a part needs no barrier."""


@triton.jit  # type: ignore[untyped-decorator]
def _score(  # type: ignore[no-untyped-def] # triton reads annotations as code
    logits,
    taught,
    places,
    labels,
    weights,
    entropies,
    apart,
    correct,
    stride,
    taught_stride,
    ce_weight,
    l1_weight,
    VOCAB: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    taught += tl.load(places + row) * taught_stride
    label = tl.load(labels + row)
    own = tl.load(logits + label).to(tl.float32)
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]

    # Finite, so that a lane beyond a small vocabulary never subtracts two infinities.
    top, high = tl.full((LANES,), -1e30, tl.float32), tl.full((LANES,), -1e30, tl.float32)
    total, sum_high = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for begin in range(0, VOCAB, LANES * EACH):
        index = begin + columns
        scores = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
        top = higher
        meant = tl.load(taught + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(high, tl.max(meant, 1))
        sum_high = sum_high * tl.exp(high - higher) + tl.sum(tl.exp(meant - higher[:, None]), 1)
        high = higher
    peak = tl.max(top, 0)
    mass = tl.log(tl.sum(total * tl.exp(top - peak), 0)) + peak
    summit = tl.max(high, 0)
    other_mass = tl.log(tl.sum(sum_high * tl.exp(high - summit), 0)) + summit
    tl.store(entropies + row, mass - own)
    tl.store(correct + row, tl.where(own >= peak, 1.0, 0.0))

    # Back from the end of the row, which is still in the cache.
    last = (VOCAB - 1) // (LANES * EACH) * (LANES * EACH)
    distance, signed = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    for back in range(0, VOCAB, LANES * EACH):
        index = last - back + columns
        scores = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        meant = tl.load(taught + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        share = tl.exp(scores - mass)
        difference = share - tl.exp(meant - other_mass)
        distance += tl.sum(tl.abs(difference), 1)
        sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
        signed += tl.sum(share * sign, 1)
    tl.store(apart + row, tl.sum(distance, 0))

    mean, weight = tl.sum(signed, 0), tl.load(weights + row)
    for begin in range(0, VOCAB, LANES * EACH):
        index = begin + columns
        scores = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        meant = tl.load(taught + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        share = tl.exp(scores - mass)
        difference = share - tl.exp(meant - other_mass)
        sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
        gradient = share * (ce_weight + l1_weight * (sign - mean))
        # The label's entry before rounding to the logits' dtype, or a nearly right prediction would be lost in it.
        gradient = tl.where(index == label, gradient - ce_weight, gradient) * weight
        tl.store(logits + index, gradient.to(logits.dtype.element_ty), mask=index < VOCAB)


def score(
    logits: Tensor,
    taught: Tensor,
    places: Tensor,
    labels: Tensor,
    weights: Tensor,
    ce_weight: float,
    l1_weight: float,
) -> Tensor:
    """Cross-entropies, L1 distances, and 1 where the label is the best token, else 0: float32 [3, C].

    logits: [C, V] with contiguous rows, which become their gradient. taught: the teachers' [U, V]. places: which is
    whose, int64 [C]. labels: int64 [C]. weights: of the gradient, float32 [C].
    """
    num_rows, vocab = logits.shape
    found = torch.empty(3, num_rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device):
        _score[(num_rows,)](
            logits,
            taught,
            places,
            labels,
            weights,
            *found,
            logits.stride(0),
            taught.stride(0),
            ce_weight,
            l1_weight,
            VOCAB=vocab,
            LANES=LANES,
            EACH=EACH,
            num_warps=WARPS,
        )
    return found
