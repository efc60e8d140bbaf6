"""The head's rows: losses, best tokens and gradients of plain cross-entropy and topk, in chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.drafts.head import Scores, best, row_head, strip_maxima

VOCAB, HIDDEN = 97, 32


def leaf(rows: int, seed: int = 5) -> Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def plainly(hidden: Tensor, head: Tensor, labels: Tensor, top_k: int, softcap: float = 0.0) -> Scores:
    """The same with all logits at once, by autograd."""
    products = hidden @ head.T
    logits = torch.tanh(products / softcap) * softcap if softcap else products
    ids = products.topk(top_k, -1).indices
    losses = F.cross_entropy(logits, labels, reduction="none")
    return Scores(losses, products.argmax(-1) == labels, logits.gather(1, ids), ids)


def gradient(scores: Scores, of: Tensor) -> Tensor:
    """Of a total in which each row has a weight that depends on its loss, and each value one of its own."""
    weights = torch.exp(-scores.losses.detach())
    slopes = torch.linspace(-1, 2, scores.values.numel()).view_as(scores.values)
    total = torch.dot(scores.losses, weights) + (scores.values * slopes).sum()
    (found,) = torch.autograd.grad(total, of)
    return found


@pytest.mark.parametrize("top_k", [0, 5, VOCAB])
@pytest.mark.parametrize("softcap", [0.0, 2.5])
@pytest.mark.parametrize(("rows", "chunk"), [(23, 7), (23, 100), (1, 1)])
def test_rows_equal_those_of_torch_and_so_does_the_gradient_under_any_weights(
    rows: int, chunk: int, softcap: float, top_k: int
) -> None:
    torch.manual_seed(0)
    head, labels = torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (rows,))
    ours, theirs = leaf(rows), leaf(rows)
    found = row_head(ours, head, labels, chunk, top_k=top_k, softcap=softcap)
    wanted = plainly(theirs, head, labels, top_k, softcap)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient(found, ours), gradient(wanted, theirs), atol=1e-5, rtol=1e-5)


def test_losses_or_values_alone_have_gradients() -> None:
    torch.manual_seed(0)
    head, labels, hidden = torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (9,)), leaf(9)
    scores, wanted = row_head(hidden, head, labels, 4, top_k=3), plainly(hidden, head, labels, 3)
    for one, other in ((scores.losses, wanted.losses), (scores.values, wanted.values)):
        found, theirs = (torch.autograd.grad(part.sum(), hidden, retain_graph=True)[0] for part in (one, other))
        torch.testing.assert_close(found, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("vocab", [128, 700, 1280, 1301])
def test_the_best_tokens_of_a_large_vocabulary_are_found_in_its_best_strips(vocab: int) -> None:
    logits = torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[7, -4:] = 9.0 + torch.arange(4)  # all in the last strip
    found, ids = best(logits, strip_maxima(logits), 4)
    wanted = logits.topk(4, -1)
    assert torch.equal(found, wanted.values)
    assert torch.equal(ids, wanted.indices)
    logits[3] = torch.nan
    assert int(best(logits, strip_maxima(logits), 4)[1].max()) < vocab


def test_equal_logits_that_a_soft_cap_makes_equal_are_told_apart() -> None:
    torch.manual_seed(0)
    head, labels = torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (23,))
    correct = row_head(1e3 * head[labels], head, labels, 7, softcap=1e-3).correct
    assert correct.tolist() == ((1e3 * head[labels] @ head.T).argmax(-1) == labels).tolist(), "capped, all are equal"


def test_rows_in_bfloat16_are_close_also_where_the_prediction_is_nearly_right() -> None:
    torch.manual_seed(0)
    head, labels = torch.randn(VOCAB, HIDDEN), torch.randint(VOCAB, (16,))
    hidden = (0.35 * head[labels] + 0.05 * torch.randn(16, HIDDEN)).bfloat16()
    exact, low = hidden.double().requires_grad_(), hidden.clone().requires_grad_()
    wanted = gradient(plainly(exact, head.bfloat16().double(), labels, 4), exact)
    found = gradient(row_head(low, head.bfloat16(), labels, 5, top_k=4), low)
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.parametrize("top_k", [0, 4])
def test_no_rows_are_zero_with_zero_gradient(top_k: int) -> None:
    hidden = torch.randn(0, HIDDEN, requires_grad=True)
    scores = row_head(hidden, torch.randn(VOCAB, HIDDEN), torch.empty(0, dtype=torch.int64), 4, top_k=top_k)
    total = torch.dot(scores.losses, torch.empty(0)) + scores.values.sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert total.item() == 0.0
    assert [tuple(part.shape) for part in scores] == [(0,), (0,), (0, top_k), (0, top_k)]
    assert hidden.grad is not None


@pytest.mark.gpu(1)
@pytest.mark.parametrize("top_k", [0, 16])
@pytest.mark.parametrize("vocab", [97, 32000, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernels_equal_the_plain_path(vocab: int, dtype: torch.dtype, top_k: int) -> None:
    """Losses, hits, best tokens and gradient, of chunks that do not divide the rows; and no float32 copy of logits."""
    torch.manual_seed(0)
    rows, chunk, width = 300, 128, 64
    head = torch.randn(vocab, width, device="cuda").to(dtype)
    labels, weights = torch.randint(vocab, (rows,), device="cuda"), torch.rand(rows, device="cuda")
    hidden = torch.randn(rows, width, device="cuda")
    hidden[::3] = 0.5 * head[labels[::3]].float()
    results, peaks = [], []
    for fused in (True, False):
        own = hidden.to(dtype).requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scores = row_head(own, head, labels, chunk, top_k=top_k, fused=fused)
        total = torch.dot(scores.losses, weights) + (scores.values * weights[:, None]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        peaks.append(torch.cuda.max_memory_allocated() - before)
        assert own.grad is not None
        results.append((scores, own.grad.float()))
    (fused_scores, fused_grad), (scores, grad) = results
    torch.testing.assert_close(fused_scores.losses, scores.losses, rtol=1e-5, atol=1e-4)
    assert torch.equal(fused_scores.correct, scores.correct)
    assert torch.equal(fused_scores.values, scores.values)
    whole = (
        (hidden.to(dtype) @ head.T).float().topk(top_k, -1).values
    )  # a product of another size sums in another order
    torch.testing.assert_close(fused_scores.values, whole, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    assert scores.correct.any()
    assert not scores.correct.all()
    assert (fused_grad - grad).norm() < (1e-2 if dtype == torch.bfloat16 else 1e-5) * grad.norm()
    if vocab == 151936 and not top_k:
        assert peaks[0] < 1.2 * chunk * vocab * head.itemsize


@pytest.mark.gpu(1)
@pytest.mark.parametrize("top_k", [0, 16])
def test_the_fused_kernels_are_the_same_from_run_to_run_and_tell_a_bad_loss(top_k: int) -> None:
    torch.manual_seed(0)
    head, labels = torch.randn(50257, 64, device="cuda").bfloat16(), torch.randint(50257, (200,), device="cuda")
    hidden, losses, grads = torch.randn(200, 64, device="cuda").bfloat16(), [], []
    for _ in range(2):
        own = hidden.clone().requires_grad_()
        scores = row_head(own, head, labels, 64, top_k=top_k, fused=True)
        (scores.losses.sum() + scores.values.sum()).backward()  # type: ignore[no-untyped-call]
        assert own.grad is not None
        losses.append(scores.losses)
        grads.append(own.grad)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(grads[0], grads[1])
    hidden[7, 3] = float("nan")
    scores = row_head(hidden, head, labels, 64, top_k=top_k, fused=True)
    assert scores.losses[7].isnan()
    assert top_k == 0 or int(scores.ids.max()) < 50257
