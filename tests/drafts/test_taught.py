"""The loss of a trained head against a frozen one, and its gradients, held against torch's own operations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from specd.drafts.device import Ints
from specd.drafts.logits import LogitTransform
from specd.drafts.taught import Teacher, taught_loss

V, W, H, U = 31, 11, 8, 13
PLACES = (np.array([0, 1, 2, 5, 12]), np.array([1, 2, 12]), np.array([], np.int64))
WEIGHTS = (1.0, 0.5, 0.25)


def given(chunk: int, transform: LogitTransform, dtype: torch.dtype) -> tuple[Tensor, Tensor, Teacher]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, H, generator=generator).to(dtype).requires_grad_()
    master = torch.randn(W, H, generator=generator).requires_grad_()
    vocabulary = torch.arange(2, 2 + 2 * W, 2)
    head, states = (torch.randn(size, H, generator=generator).to(dtype) for size in (V, U))
    return hidden, master, Teacher(head, vocabulary, transform, states, chunk)


def plainly(
    hidden: Tensor, master: Tensor, teacher: Teacher, taught: Sequence[Ints], weights: Sequence[float]
) -> tuple[Tensor, list[int], list[int]]:
    total, counted, correct, row = hidden.sum() * 0 + master.sum() * 0, [0] * len(taught), [0] * len(taught), 0
    for step, places in enumerate(taught):
        for place in places.tolist():
            logits = teacher.head @ teacher.states[place]
            best, own = int(logits.argmax()), teacher.vocabulary.tolist()
            logs = (master.to(hidden.dtype) @ hidden[row]).float().log_softmax(0)
            row += 1
            if best in own:
                target = teacher.transform(logits.float()[teacher.vocabulary]).softmax(0)
                total = total - weights[step] * (target * logs).sum()
                counted[step] += 1
                correct[step] += own[int(logs.argmax())] == best
    return total, counted, correct


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.25, 1.5)])
def test_it_is_what_torch_computes(chunk: int, transform: LogitTransform) -> None:
    hidden, master, teacher = given(chunk, transform, torch.float32)
    wanted, counts, right = plainly(hidden, master, teacher, PLACES, WEIGHTS)
    assert 0 < sum(counts) < 8
    slopes = torch.autograd.grad(wanted, (hidden, master))
    total, counted, correct = taught_loss(hidden, master, teacher, PLACES, WEIGHTS)
    torch.testing.assert_close(total, wanted)
    assert (counted.tolist(), correct.tolist()) == (counts, right)
    (3 * total).backward()  # type: ignore[no-untyped-call]
    for tensor, slope in zip((hidden, master), slopes, strict=True):
        torch.testing.assert_close(tensor.grad, 3 * slope)


def test_a_coarse_dtype_keeps_a_float32_gradient_of_the_head() -> None:
    hidden, master, teacher = given(4, LogitTransform(), torch.bfloat16)
    total, *_ = taught_loss(hidden, master, teacher, PLACES, WEIGHTS)
    wanted, *_ = plainly(hidden, master, teacher, PLACES, WEIGHTS)
    total.backward()  # type: ignore[no-untyped-call]
    assert (total.dtype, hidden.grad.dtype, master.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)  # type: ignore[union-attr]
    torch.testing.assert_close(total, wanted, rtol=1e-2, atol=1e-2)


def test_a_frozen_side_gets_no_gradient_and_no_rows_are_zero() -> None:
    hidden, master, teacher = given(4, LogitTransform(), torch.float32)
    total, *_ = taught_loss(hidden.detach(), master, teacher, PLACES, WEIGHTS)
    (slope,) = torch.autograd.grad(total, master)
    assert slope.abs().sum() > 0
    none = tuple(np.array([], np.int64) for _ in WEIGHTS)
    total, counted, _ = taught_loss(hidden[:0], master, teacher._replace(states=teacher.states[:0]), none, WEIGHTS)
    slopes = torch.autograd.grad(total, (hidden, master))
    assert (float(total.detach()), counted.tolist()) == (0.0, [0.0] * 3)
    assert not any(slope.any() for slope in slopes)
