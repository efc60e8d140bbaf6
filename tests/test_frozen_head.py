"""The chunked loss through a frozen head: values and gradients of plain cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from specd.train.frozen_head import head_loss

VOCAB, HIDDEN = 97, 32


@pytest.mark.parametrize(("rows", "chunk"), [(23, 7), (23, 100), (1, 1)])
def test_chunked_loss_equals_cross_entropy(rows: int, chunk: int) -> None:
    torch.manual_seed(0)
    head, labels, weights = torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (rows,)), torch.rand(rows)
    ours, theirs = (torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    ours.requires_grad_()
    theirs.requires_grad_()
    total, correct = head_loss(ours, head, labels, weights, chunk)
    logits = theirs @ head.T
    expected = (F.cross_entropy(logits, labels, reduction="none") * weights).sum()
    torch.testing.assert_close(total, expected)
    assert torch.equal(correct, logits.argmax(-1) == labels)
    (total / 3).backward()  # type: ignore[no-untyped-call]
    (expected / 3).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


def test_chunked_loss_in_bfloat16_is_close_also_where_the_prediction_is_nearly_right() -> None:
    torch.manual_seed(0)
    head, labels = torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (16,))
    hidden = (0.35 * head[labels] + 0.05 * torch.randn(16, HIDDEN)).bfloat16()
    exact = hidden.double().requires_grad_()
    F.cross_entropy(exact @ head.bfloat16().double().T, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    low = hidden.requires_grad_()
    total, _ = head_loss(low, head.bfloat16(), labels, torch.ones(16), 5)
    total.backward()  # type: ignore[no-untyped-call]
    assert low.grad is not None
    assert exact.grad is not None
    assert (low.grad.double() - exact.grad).norm() / exact.grad.norm() < 0.05


def test_chunked_loss_without_rows_is_zero_with_zero_gradient() -> None:
    hidden = torch.randn(0, HIDDEN, requires_grad=True)
    total, correct = head_loss(hidden, torch.randn(VOCAB, HIDDEN), torch.empty(0, dtype=torch.int64), torch.empty(0), 4)
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 0.0
    assert correct.shape == (0,)
