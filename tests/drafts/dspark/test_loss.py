"""Distances of distributions in chunks, and their gradients, against the definition on whole tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.drafts.dspark.loss import Distances, Teacher, distances

V, H, RANK, T = 61, 16, 5, 12
SOURCES = np.array([3, 9, 3, 4, 5, 4, 11, 9, 9, 0, 9], np.int64)


Inputs = tuple[Tensor, Tensor, Tensor]
"""States, rows of W1, and W2."""


def given(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Inputs, Teacher]:
    """Inputs that want gradients, and a teacher."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((len(SOURCES), H), (len(SOURCES), RANK), (V, RANK), (V, H), (T, H))
    hidden, before, master, head, states = (torch.randn(size, generator=generator) for size in sizes)
    inputs = hidden.to(dtype).requires_grad_(), before.to(dtype).requires_grad_(), master.requires_grad_()
    fixed: dict[str, Any] = {"softcap": 0.0, "ce_weight": 0.3, "l1_weight": 0.7, "chunk": 4, "fused": False} | changes
    return inputs, Teacher(head=head.to(dtype), states=states.to(dtype), **fixed)


def labels_and_weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(V, (len(SOURCES),), generator=generator)
    return labels, torch.rand(len(SOURCES), generator=generator) + 0.1


def whole(inputs: Inputs, teacher: Teacher) -> Distances:
    """The same at once, by autograd."""
    hidden, before, master = inputs
    labels, weights = labels_and_weights()
    logits, theirs = (
        hidden @ teacher.head.T + before @ master.T,
        teacher.states[torch.from_numpy(SOURCES)] @ teacher.head.T,
    )
    if cap := teacher.softcap:
        logits, theirs = cap * torch.tanh(logits / cap), cap * torch.tanh(theirs / cap)
    entropies = F.cross_entropy(logits, labels, reduction="none")
    apart = (logits.softmax(-1) - theirs.softmax(-1)).abs().sum(-1)
    total = torch.dot(teacher.ce_weight * entropies + teacher.l1_weight * apart, weights)
    return Distances(total, entropies, apart, (logits.argmax(-1) == labels).float())


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("changes", [{}, {"softcap": 2.0}, {"ce_weight": 0.0, "l1_weight": 2.0}])
def test_chunks_are_the_definition(chunk: int, changes: dict[str, Any]) -> None:
    inputs, teacher = given(chunk=chunk, **changes)
    found, wanted = distances(*inputs, teacher, SOURCES, *labels_and_weights()), whole(inputs, teacher)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    slopes = torch.autograd.grad(3 * wanted.total, inputs)
    for one, other in zip(torch.autograd.grad(3 * found.total, inputs), slopes, strict=True):
        torch.testing.assert_close(one, other)


def test_what_needs_no_gradient_gets_none() -> None:
    (hidden, before, master), teacher = given()
    before.requires_grad_(False)
    distances(hidden, before, master, teacher, SOURCES, *labels_and_weights()).total.backward()  # type: ignore[no-untyped-call]
    assert before.grad is None
    assert hidden.grad is not None
    assert master.grad is not None


def test_low_precision_rounds_gradients_and_no_distribution() -> None:
    inputs, teacher = given(torch.bfloat16)
    found = distances(*inputs, teacher, SOURCES, *labels_and_weights())
    first, second, third = (part.detach().float().requires_grad_() for part in inputs)
    full = first, second, third
    wanted = whole(full, teacher._replace(head=teacher.head.float(), states=teacher.states.float()))
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, wanted.total, rtol=0.02, atol=0.0)
    slopes = torch.autograd.grad(wanted.total, full)
    for one, other in zip(torch.autograd.grad(found.total, inputs), slopes, strict=True):
        assert (one.float() - other).norm() < 0.03 * other.norm()


def test_no_rows_are_an_exact_zero() -> None:
    (hidden, before, master), teacher = given()
    none = torch.zeros(0, dtype=torch.int64)
    found = distances(hidden[:0], before[:0], master, teacher, SOURCES[:0], none, torch.zeros(0))
    found.total.backward()  # type: ignore[no-untyped-call]
    assert found.total.item() == 0.0
    assert master.grad is not None
    assert not master.grad.any()
