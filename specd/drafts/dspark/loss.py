"""DSpark's loss: how far a draft's distribution is from the target's, through a frozen and a low-rank head, in chunks.

Shape legend: R rows (predictions), C of them whose logits exist at a time, U ≤ C teachers of these, T tokens of a
batch, H hidden size, V vocabulary, r rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specd.drafts.device import Ints, to_device
from specd.drafts.taught import add_product


class Teacher(NamedTuple):
    """A target and what it says. head: its lm_head [V, H], frozen. states: its final states [T, H], multiplied.

    softcap: c of logits that are c · tanh(product / c), its own and the draft's; 0 for products as they are.
    ce_weight, l1_weight: of the two terms. chunk: rows whose logits exist at a time, and as many of their teachers'.
    fused: by the kernel of `specd.drafts.dspark.loss_kernel`, on CUDA, with triton and without a soft-cap only.
    """

    head: Tensor
    states: Tensor
    softcap: float
    ce_weight: float
    l1_weight: float
    chunk: int
    fused: bool


class Distances(NamedTuple):
    """total: Σ weight · (ce_weight · cross-entropy + l1_weight · L1), 0-d float32. Without a gradient, float32 [R]:

    cross_entropies: of the labels. apart: L1 distances of the distributions, 0 to 2. correct: 1 where the label is the
    draft's best token, else 0.
    """

    total: Tensor
    cross_entropies: Tensor
    apart: Tensor
    correct: Tensor


class DistanceLoss(torch.autograd.Function):
    """See `distances`.

    Gradients are taken while a chunk's logits are at hand. Rows of one teacher come together, so that its logits are
    computed once, or twice where a chunk ends between them. Softmaxes are float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        before: Tensor,
        master: Tensor,
        teacher: Teacher,
        sources: Ints,
        labels: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head, second, device = teacher.head, master.to(hidden.dtype), hidden.device
        # Of each row: cross-entropy, L1 distance, is right.
        found = torch.zeros(3, hidden.shape[0], dtype=torch.float32, device=device)
        grad, grad_before, grad_master = (
            torch.zeros_like(part) if needed else None
            for part, needed in zip((hidden, before, master), ctx.needs_input_grad, strict=False)
        )
        order = np.argsort(sources, kind="stable")
        bounds = range(0, len(order), teacher.chunk)
        parts = [np.unique(sources[order[low : low + teacher.chunk]], return_inverse=True) for low in bounds]
        none = [np.zeros(0, np.int64)]
        rows, teachers, places = (
            to_device(np.concatenate(part), device)
            for part in ([order], none + [own for own, _ in parts], none + [place for _, place in parts])
        )
        size = min(teacher.chunk, len(order))
        logits_of, taught_of = (hidden.new_empty(size, head.shape[0]) for _ in range(2))
        score, end = (_fused if teacher.fused and not teacher.softcap else _plain), 0
        for low, (known, _) in zip(bounds, parts, strict=True):
            own, begin, end = rows[low : low + teacher.chunk], end, end + known.size
            states, gained = hidden.index_select(0, own), before.index_select(0, own)
            logits = torch.mm(states, head.T, out=logits_of[: own.shape[0]])
            torch.addmm(logits, gained, second.T, out=logits)
            taught = teacher.states.index_select(0, teachers[begin:end])
            taught = torch.mm(taught, head.T, out=taught_of[: known.size])
            of = places[low : low + teacher.chunk], labels[own], weights[own]
            found.index_copy_(1, own, score(logits, taught, *of, teacher))
            if grad is not None:
                grad.index_copy_(0, own, logits @ head)
            if grad_before is not None:
                grad_before.index_copy_(0, own, logits @ second)
            if grad_master is not None:
                add_product(grad_master, logits, gained)
        ctx.slopes = grad, grad_before, grad_master
        entropies, apart, correct = found
        ctx.mark_non_differentiable(entropies, apart, correct)
        total = torch.dot(teacher.ce_weight * entropies + teacher.l1_weight * apart, weights)
        return total, entropies, apart, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        # Scaled in place, and so for one backward only: the Markov head's is as long as the vocabulary.
        slopes, ctx.slopes = ctx.slopes, None
        return *(None if part is None else part.mul_(grad_outputs[0]) for part in slopes), *[None] * 4


def distances(
    hidden: Tensor, before: Tensor, master: Tensor, teacher: Teacher, sources: Ints, labels: Tensor, weights: Tensor
) -> Distances:
    """How far softmax(hidden · headᵀ + before · masterᵀ) is from its teacher's distribution, and from the labels.

    hidden: [R, H]. before: [R, r], of the same dtype. master: the Markov head, float32 [V, r]. sources: the row of
    `teacher.states` that teaches each row, [R]. labels: int64 [R]. weights: float32 [R]. No rows give an exact zero.
    """
    return Distances(*DistanceLoss.apply(hidden, before, master, teacher, sources, labels, weights))  # type: ignore[no-untyped-call]


def _fused(logits: Tensor, taught: Tensor, places: Tensor, labels: Tensor, weights: Tensor, teacher: Teacher) -> Tensor:
    """As `_plain`, by one kernel."""
    from specd.drafts.dspark.loss_kernel import score

    return score(logits, taught, places, labels, weights, teacher.ce_weight, teacher.l1_weight)


def _plain(logits: Tensor, taught: Tensor, places: Tensor, labels: Tensor, weights: Tensor, teacher: Teacher) -> Tensor:
    """Cross-entropies, L1 distances, and 1 where the label is the best token, else 0: float32 [3, C].

    taught: the teachers' products with the head [U, V]. places: which is whose, int64 [C]. The logits [C, V], products
    too, become the gradient of weights · (ce_weight · cross-entropy + l1_weight · L1).
    """
    cap, scores = teacher.softcap, logits.float()
    correct = scores.gather(1, labels[:, None])[:, 0] >= scores.amax(-1)
    theirs, bend = taught.float(), None
    if cap:
        scores, theirs = torch.tanh(scores / cap), torch.tanh(theirs / cap).mul_(cap)
        bend = 1 - scores.square()
        scores.mul_(cap)
    logs = scores.log_softmax(-1)
    entropies = -logs.gather(1, labels[:, None])[:, 0]
    shares = logs.exp_()
    differences = theirs.softmax(-1)[places].neg_().add_(shares)
    apart = differences.abs().sum(-1)
    # d Σ|q − t| / d logit = q · (sign(q − t) − Σ q sign(q − t)).
    signs = differences.sign_()
    mean = (shares * signs).sum(-1, keepdim=True)
    slopes = signs.sub_(mean).mul_(teacher.l1_weight).add_(teacher.ce_weight).mul_(shares)
    slopes.scatter_add_(1, labels[:, None], slopes.new_full((len(labels), 1), -teacher.ce_weight))
    if bend is not None:
        slopes.mul_(bend)
    logits.copy_(slopes.mul_(weights[:, None]))
    return torch.stack((entropies, apart, correct.float()))
