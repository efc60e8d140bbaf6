"""Cross-entropy through a frozen lm_head, row by row, and the best tokens of each row, in one pass over the head.

Shape legend: R rows (predictions), H hidden size, V vocabulary, K best tokens that are wanted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

STRIP = 128
"""Adjacent logits of which only the highest is looked at first."""


class Scores(NamedTuple):
    """What the head says of each row.

    losses: −log softmax(hidden · headᵀ)[label], float32 [R]. correct: its label scored highest, bool [R].
    values, ids: the K highest logits, float32 [R, K], the highest first, and their tokens, int64. Losses and values
    can be weighted by anything, also by what depends on them, and have gradients.
    """

    losses: Tensor
    correct: Tensor
    values: Tensor
    ids: Tensor


class RowHead(torch.autograd.Function):
    """See `row_head`.

    The gradient of `hidden` is taken while a chunk's logits are at hand, of each row as if it weighed 1, and weighted
    in the backward: two products with the head instead of the three of recomputation, and never more than `chunk` rows
    of logits. That of the K values reads K rows of the head a row. Log-softmax accumulates in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, chunk: int, top_k: int, fused: bool, softcap: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_rows, device = hidden.shape[0], hidden.device
        losses = torch.empty(num_rows, dtype=torch.float32, device=device)
        correct = torch.empty(num_rows, dtype=torch.bool, device=device)
        values = torch.empty(num_rows, top_k, dtype=torch.float32, device=device)
        ids = torch.empty(num_rows, top_k, dtype=torch.int64, device=device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        buffer = hidden.new_empty(min(chunk, num_rows), head.shape[0])
        for begin in range(0, num_rows, chunk):
            rows = slice(begin, min(begin + chunk, num_rows))
            logits = torch.mm(hidden[rows], head.T, out=buffer[: rows.stop - begin])
            out = Scores(losses[rows], correct[rows], values[rows], ids[rows])
            part = grad[rows] if grad is not None else None
            if fused and not softcap:
                _fused(logits, head, labels[rows], out, part)
            else:
                _plain(logits, head, labels[rows], out, part, softcap)
        ctx.save_for_backward(grad, head, values, ids)
        ctx.softcap = softcap
        ctx.mark_non_differentiable(correct, ids)
        ctx.set_materialize_grads(False)
        return losses, correct, values, ids

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        grad, head, values, ids = ctx.saved_tensors
        by_loss, _, by_value, _ = grad_outputs
        out = torch.zeros_like(grad) if by_loss is None else torch.empty_like(grad)
        if by_loss is not None:
            torch.mul(grad, by_loss[:, None], out=out)
        if by_value is not None and by_value.numel():
            if ctx.softcap:
                by_value = by_value * (1 - (values / ctx.softcap).square())
            out += F.embedding_bag(ids, head, mode="sum", per_sample_weights=by_value.to(head.dtype))
        return out, *[None] * 6


def row_head(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    chunk: int,
    *,
    top_k: int = 0,
    fused: bool = False,
    softcap: float = 0.0,
) -> Scores:
    """hidden [R, H] and head [V, H] of one dtype, labels int64 [R] -> `Scores`, of K = top_k ≤ V. R may be 0.

    chunk: rows whose logits exist at a time. fused: by the kernels of `specd.drafts.head_kernel`, on CUDA and with
    triton only: logits become their gradient in place and never exist in float32. softcap: c of logits that are
    c · tanh(product / c), for which there are no such kernels; 0 for products as they are.
    """
    return Scores(*RowHead.apply(hidden, head, labels, chunk, top_k, fused, softcap))  # type: ignore[no-untyped-call]


def best(logits: Tensor, maxima: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` highest of logits [R, V], float32, and where they are, int64; exact, the highest first.

    maxima: of each strip of STRIP columns, [R, ⌈V / STRIP⌉]. The best are in the strips with the highest maxima, so
    only those are sorted: a sort of all of a large vocabulary takes longer than the products with the head.
    """
    vocab = logits.shape[1]
    if maxima.shape[1] <= top_k:
        found, ids = logits.float().topk(top_k, -1)
        return found, ids
    strips = maxima.topk(top_k, -1).indices
    places = (strips[:, :, None] * STRIP + torch.arange(STRIP, device=logits.device)).flatten(1)
    inside = logits.gather(1, places.clamp(max=vocab - 1)).float().masked_fill_(places >= vocab, -torch.inf)
    found, order = inside.topk(top_k, -1)
    return found, places.gather(1, order).clamp_(max=vocab - 1)  # a row of NaN names tokens, too


def strip_maxima(logits: Tensor) -> Tensor:
    """The highest of each STRIP columns of logits [R, V]; the last strip may be shorter."""
    whole = logits.shape[1] // STRIP * STRIP
    parts = [logits[:, :whole].reshape(len(logits), -1, STRIP).amax(-1)] if whole else []
    if whole < logits.shape[1]:
        parts.append(logits[:, whole:].amax(-1, keepdim=True))
    return torch.cat(parts, 1)


def _fused(logits: Tensor, head: Tensor, labels: Tensor, out: Scores, grad: Tensor | None) -> None:
    """Scores and, where wanted, the gradient of one chunk, by kernels that overwrite the logits."""
    from specd.drafts.head_kernel import score, slope

    if top_k := out.values.shape[1]:
        maxima = logits.new_empty(logits.shape[0], -(-logits.shape[1] // STRIP), dtype=torch.float32)
        score(logits, labels, out.losses, out.correct, maxima=maxima)
        for kept, found in zip((out.values, out.ids), best(logits, maxima, top_k), strict=True):
            kept.copy_(found)
        if grad is not None:
            slope(logits, labels, out.losses)
    else:
        score(logits, labels, out.losses, out.correct, gradient=grad is not None)
    if grad is not None:
        torch.mm(logits, head, out=grad)


def _plain(logits: Tensor, head: Tensor, labels: Tensor, out: Scores, grad: Tensor | None, softcap: float) -> None:
    """The same in torch's own operations, through a float32 copy of the logits."""
    scores, bend = logits.float(), None
    top, own = scores.amax(-1), scores.gather(1, labels[:, None])[:, 0]
    out.correct.copy_(own >= top)  # of products, as those that a soft-cap bends may be equal
    if top_k := out.values.shape[1]:
        found, ids = best(scores, strip_maxima(scores), top_k)
        out.values.copy_(torch.tanh(found / softcap) * softcap if softcap else found)
        out.ids.copy_(ids)
    if softcap:
        scores = torch.tanh(scores / softcap)
        bend = 1 - scores.square()
        scores.mul_(softcap)
        top, own = scores.amax(-1), scores.gather(1, labels[:, None])[:, 0]
    # In place, because a chunk of logits is larger than any cache: exp(score − top), normalised at the end. Where
    # logits are float32, `scores` is the chunk's own buffer.
    total = scores.sub_(top[:, None]).exp_().sum(-1)
    out.losses.copy_(total.log() + top - own)
    if grad is not None:
        # total · (softmax − one-hot); the label's entry before rounding to the head's dtype, or a nearly right
        # prediction would be lost in it.
        scores.scatter_(1, labels[:, None], ((own - top).exp() - total)[:, None])
        if bend is not None:
            scores.mul_(bend)
        product = torch.mm(scores.to(head.dtype), head)
        grad.copy_(product.float() / total[:, None])
