"""The chunked loss through a frozen head: values and gradients of plain cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from specd.drafts.head import head_loss

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


def test_a_soft_cap_is_part_of_the_loss_and_changes_no_hit() -> None:
    torch.manual_seed(0)
    head, labels, weights = torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (23,)), torch.rand(23)
    ours, theirs = (torch.randn(23, HIDDEN, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    logits = theirs.requires_grad_() @ head.T
    expected = (F.cross_entropy(2.5 * torch.tanh(logits / 2.5), labels, reduction="none") * weights).sum()
    total, correct = head_loss(ours.requires_grad_(), head, labels, weights, 7, softcap=2.5)
    torch.testing.assert_close(total, expected)
    assert torch.equal(correct, logits.argmax(-1) == labels)
    total.backward()  # type: ignore[no-untyped-call]
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)
    _, correct = head_loss(1e3 * head[labels], head, labels, weights, 7, softcap=1e-3)
    assert correct.tolist() == ((1e3 * head[labels] @ head.T).argmax(-1) == labels).tolist(), "capped, all are equal"


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


@pytest.mark.gpu(1)
@pytest.mark.parametrize("vocab", [97, 32000, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_equals_the_plain_path(vocab: int, dtype: torch.dtype) -> None:
    """Loss, hits and gradient, of chunks that do not divide the rows; and no float32 copy of the logits."""
    torch.manual_seed(0)
    rows, chunk, width = 300, 128, 64
    head = torch.randn(vocab, width, device="cuda").to(dtype)
    labels, weights = torch.randint(vocab, (rows,), device="cuda"), torch.rand(rows, device="cuda")
    hidden = torch.randn(rows, width, device="cuda")
    hidden[::3] = 0.5 * head[labels[::3]].float()
    results, peaks = [], []
    for fused in (True, False):
        leaf = hidden.to(dtype).requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        total, correct = head_loss(leaf, head, labels, weights, chunk, fused)
        total.backward()  # type: ignore[no-untyped-call]
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert leaf.grad is not None
        results.append((total, correct, leaf.grad.float()))
    (fused_total, fused_correct, fused_grad), (total, correct, grad) = results
    torch.testing.assert_close(fused_total, total, rtol=1e-5, atol=1e-3)
    assert torch.equal(fused_correct, correct)
    assert correct.any()
    assert not correct.all()
    assert (fused_grad - grad).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * grad.norm()
    if vocab == 151936:
        assert peaks[0] < 1.2 * chunk * vocab * head.itemsize


@pytest.mark.gpu(1)
def test_the_fused_kernel_is_the_same_from_run_to_run_and_tells_a_bad_loss() -> None:
    torch.manual_seed(0)
    head, labels = torch.randn(50257, 64, device="cuda").bfloat16(), torch.randint(50257, (200,), device="cuda")
    hidden, weights = torch.randn(200, 64, device="cuda").bfloat16(), torch.rand(200, device="cuda")
    losses, grads = [], []
    for _ in range(2):
        leaf = hidden.clone().requires_grad_()
        total, _ = head_loss(leaf, head, labels, weights, 64, fused=True)
        total.backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        losses.append(total.item())
        grads.append(leaf.grad)
    assert losses[0] == losses[1]
    assert torch.equal(grads[0], grads[1])
    hidden[7, 3] = float("nan")
    assert head_loss(hidden, head, labels, weights, 64, fused=True)[0].isnan()
