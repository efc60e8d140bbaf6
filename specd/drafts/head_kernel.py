"""Passes over a chunk of logits: loss, whether it was right, maxima, and the gradient written where the logits were.

Needs triton, so it is imported only where there is a GPU. Shape legend: R rows, V vocabulary.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from specd.drafts.head import STRIP

triton: Any = importlib.import_module("triton")
tl: Any = importlib.import_module("triton.language")

LANES, EACH, WARPS = 512, 16, 16
"""A row is read in parts of LANES × EACH logits; each lane keeps its own maximum, so a part needs no barrier."""


@triton.jit  # type: ignore[untyped-decorator]
def _score(  # type: ignore[no-untyped-def] # triton reads annotations as code
    logits,
    labels,
    losses,
    correct,
    maxima,
    stride,
    VOCAB: tl.constexpr,
    GRADIENT: tl.constexpr,
    MAXIMA: tl.constexpr,
    STRIP: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(labels + row)
    own = tl.load(logits + label).to(tl.float32)
    columns = tl.arange(0, LANES)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    NUM_STRIPS: tl.constexpr = (VOCAB + STRIP - 1) // STRIP
    strips = tl.arange(0, LANES * EACH // STRIP)

    # Finite, so that a lane beyond a small vocabulary never subtracts two infinities.
    top = tl.full((LANES,), -1e30, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for begin in range(0, VOCAB, LANES * EACH):
        index = begin + columns
        scores = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        highest = tl.max(scores, 1)
        if MAXIMA:
            place = begin // STRIP + strips
            strip = tl.max(tl.reshape(highest, (LANES * EACH // STRIP, STRIP // EACH)), 1)
            tl.store(maxima + row * NUM_STRIPS + place, strip, mask=place < NUM_STRIPS)
        higher = tl.maximum(top, highest)
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
        top = higher
    peak = tl.max(top, 0)
    mass = tl.sum(total * tl.exp(top - peak), 0)
    tl.store(losses + row, tl.log(mass) + peak - own)
    tl.store(correct + row, own >= peak)

    if GRADIENT:
        scale = 1.0 / mass
        # Back from the end of the row, which is still in the cache.
        last = (VOCAB - 1) // (LANES * EACH) * (LANES * EACH)
        for back in range(0, VOCAB, LANES * EACH):
            index = last - back + columns
            scores = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(scores - peak) * scale
            # The label's entry before rounding to the logits' dtype, or a nearly right prediction would be lost in it.
            gradient = tl.where(index == label, gradient - 1.0, gradient)
            tl.store(logits + index, gradient.to(logits.dtype.element_ty), mask=index < VOCAB)


@triton.jit  # type: ignore[untyped-decorator]
def _slope(  # type: ignore[no-untyped-def] # triton reads annotations as code
    logits, labels, masses, stride, VOCAB: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label, mass = tl.load(labels + row), tl.load(masses + row)
    for begin in range(0, VOCAB, SIZE):
        index = begin + tl.arange(0, SIZE)
        scores = tl.load(logits + index, mask=index < VOCAB, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(scores - mass)
        gradient = tl.where(index == label, gradient - 1.0, gradient)
        tl.store(logits + index, gradient.to(logits.dtype.element_ty), mask=index < VOCAB)


def score(
    logits: Tensor,
    labels: Tensor,
    losses: Tensor,
    correct: Tensor,
    *,
    gradient: bool = False,
    maxima: Tensor | None = None,
) -> None:
    """Fill losses (float32 [R]) and correct (bool [R]) from logits [R, V] with contiguous rows. labels int64 [R].

    With `gradient` the logits become softmax − one-hot. maxima: float32 [R, ⌈V / STRIP⌉], to be filled with those of
    each strip of columns.
    """
    num_rows, vocab = logits.shape
    with torch.cuda.device(logits.get_device()):
        _score[(num_rows,)](
            logits,
            labels,
            losses,
            correct,
            losses if maxima is None else maxima,
            logits.stride(0),
            VOCAB=vocab,
            GRADIENT=gradient,
            MAXIMA=maxima is not None,
            STRIP=STRIP,
            LANES=LANES,
            EACH=EACH,
            num_warps=WARPS,
        )


def slope(logits: Tensor, labels: Tensor, losses: Tensor) -> None:
    """Logits [R, V] become softmax − one-hot. losses: those that `score` found for them, float32 [R]."""
    num_rows, vocab = logits.shape
    masses = losses + logits.gather(1, labels[:, None])[:, 0].float()
    with torch.cuda.device(logits.get_device()):
        _slope[(num_rows,)](logits, labels, masses, logits.stride(0), VOCAB=vocab, SIZE=LANES * EACH, num_warps=WARPS)
