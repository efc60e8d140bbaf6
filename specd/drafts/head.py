"""Cross-entropy through a frozen lm_head, in chunks of rows and with the gradient computed on the way.

Shape legend: R rows (predictions), H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HeadLoss(torch.autograd.Function):
    """sum_r weight_r · (−log softmax(hidden_r · headᵀ)[label_r]), and which rows were predicted right.

    The gradient of `hidden` is taken while a chunk's logits are at hand: two products with the head instead of the
    three of recomputation, and never more than `chunk` rows of logits. Log-softmax accumulates in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, chunk: int, fused: bool, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """hidden [R, H] and head [V, H] of one dtype, labels int64 [R], weights float32 [R].

        fused: one kernel turns the logits into their gradient in place, so they never exist in float32. softcap: c of
        logits that are c · tanh(product / c), for which there is no such kernel; 0 for products as they are.
        Returns the weighted sum, float32, and bool [R]: whether the label had the highest logit.
        """
        num_rows = hidden.shape[0]
        losses = torch.empty(num_rows, device=hidden.device)
        correct = torch.empty(num_rows, dtype=torch.bool, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        buffer = hidden.new_empty(min(chunk, num_rows), head.shape[0])
        for begin in range(0, num_rows, chunk):
            rows = slice(begin, min(begin + chunk, num_rows))
            logits = torch.mm(hidden[rows], head.T, out=buffer[: rows.stop - begin])
            part = grad[rows] if grad is not None else None
            chunked = logits, head, labels[rows], weights[rows], losses[rows], correct[rows], part
            if fused and not softcap:
                _fused(*chunked)
            else:
                _plain(*chunked, softcap)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(correct)
        return torch.dot(losses, weights), correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_outputs[0], *[None] * 6


def head_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, chunk: int, fused: bool = False, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`HeadLoss` with types: (weighted sum as a 0-d float32 tensor, correct bool [R]). No rows give an exact zero.

    fused: by the kernel of `specd.drafts.head_kernel`, on CUDA and with triton only, and without a softcap.
    """
    total, correct = HeadLoss.apply(hidden, head, labels, weights, chunk, fused, softcap)  # type: ignore[no-untyped-call]
    return total, correct


def _fused(
    logits: Tensor, head: Tensor, labels: Tensor, weights: Tensor, losses: Tensor, correct: Tensor, grad: Tensor | None
) -> None:
    """Losses, hits and, where wanted, the gradient of one chunk, by a kernel that overwrites the logits."""
    from specd.drafts.head_kernel import score

    score(logits, labels, weights, losses, correct, gradient=grad is not None)
    if grad is not None:
        torch.mm(logits, head, out=grad)


def _plain(
    logits: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: Tensor,
    losses: Tensor,
    correct: Tensor,
    grad: Tensor | None,
    softcap: float,
) -> None:
    """The same in torch's own operations, through a float32 copy of the logits."""
    scores, slope = logits.float(), None
    top, own = scores.amax(-1), scores.gather(1, labels[:, None])[:, 0]
    correct.copy_(own >= top)  # of products, as those that a soft-cap bends may be equal
    if softcap:
        scores = torch.tanh(scores / softcap)
        slope = 1 - scores.square()
        scores.mul_(softcap)
        top, own = scores.amax(-1), scores.gather(1, labels[:, None])[:, 0]
    # In place, because a chunk of logits is larger than any cache: exp(score − top), normalised at the end.
    total = scores.sub_(top[:, None]).exp_().sum(-1)
    losses.copy_(total.log() + top - own)
    if grad is not None:
        # total · (softmax − one-hot); the label's entry before rounding to the head's dtype, or a nearly right
        # prediction would be lost in it.
        scores.scatter_(1, labels[:, None], ((own - top).exp() - total)[:, None])
        if slope is not None:
            scores.mul_(slope)
        product = torch.mm(scores.to(head.dtype), head)
        grad.copy_(product.float() * (weights / total)[:, None])
