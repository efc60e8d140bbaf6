"""Loss of a trained head against a frozen one: the target's distribution over the draft vocabulary, chunk by chunk.

Shape legend: U teacher rows, P predictions, C of them whose logits exist at a time, H hidden size, V target vocabulary,
W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specd.drafts.device import Ints, to_device
from specd.drafts.logits import LogitTransform


class Teacher(NamedTuple):
    """A target and what it says. head: its lm_head [V, H], frozen. vocabulary: ids int64 [W] that the draft guesses.

    states: its final states [U, H]. chunk: of them, whose logits, and those of all predictions that they teach, exist
    at a time.
    """

    head: Tensor
    vocabulary: Tensor
    transform: LogitTransform
    states: Tensor
    chunk: int


class TaughtLoss(torch.autograd.Function):
    """Cross-entropy −Σ p log q of every prediction, p renormalised over the draft vocabulary.

    Gradients of hidden states and head are taken while a chunk's logits are at hand. Softmaxes are float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        master: Tensor,
        teacher: Teacher,
        taught: Sequence[Ints],
        weights: Sequence[float],
        fused: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [P, H]: the states of all steps, one step after the other. master: the head, float32 [W, H].

        taught: for each step the teacher of each of its predictions, ascending. weights: of each step. fused: one
        kernel turns logits into their gradient in place. Returns the weighted sum, float32; and for each step, float32
        [steps]: how many were counted, those whose teacher's best token is in the draft vocabulary; and how many of
        them guessed it.
        """
        head, device, sizes = master.to(hidden.dtype), hidden.device, [places.size for places in taught]
        # Of each prediction: loss, whether it counts, is right.
        found = torch.zeros(3, hidden.shape[0], dtype=torch.float32, device=device)
        grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(master) if ctx.needs_input_grad[1] else None
        # All predictions of a teacher's chunk, of whatever step, together.
        of = np.concatenate([np.zeros(0, np.int64), *taught])
        sorting = np.argsort(of // teacher.chunk, kind="stable")
        cuts = np.arange(0, teacher.states.shape[0] + teacher.chunk, teacher.chunk)
        bounds = np.searchsorted(of[sorting] // teacher.chunk, np.arange(cuts.size)).tolist()
        factors = to_device(np.repeat(np.array(weights, np.float32), sizes)[sorting], device)
        places, order = to_device(of[sorting], device), to_device(sorting, device)
        score = _fused if fused else _plain
        for cut, low, high in zip(cuts[:-1].tolist(), bounds[:-1], bounds[1:], strict=True):
            if low == high:
                continue
            own, teachers = order[low:high], places[low:high] - cut
            best, shares = _teach(teacher, slice(cut, cut + teacher.chunk))
            inside = _inside(best, teacher.vocabulary)
            rows = hidden.index_select(0, own)
            logits = rows @ head.T
            counts = inside.counts[teachers]
            losses, right = score(logits, shares, teachers, inside.places[teachers], factors[low:high] * counts)
            found.index_copy_(1, own, torch.stack((losses * counts, counts, right * counts)))
            if grad is not None:
                grad.index_copy_(0, own, logits @ head)
            if grad_head is not None:
                add_product(grad_head, logits, rows)
        ctx.slopes = grad, grad_head
        sums, counted, correct = torch.stack([part.sum(1) for part in torch.split(found, sizes, 1)], 1)
        ctx.mark_non_differentiable(counted, correct)
        return torch.dot(sums, to_device(np.array(weights, np.float32), device)), counted, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        # Scaled in place, and so for one backward only: the head's is as large as the head.
        slopes, ctx.slopes = ctx.slopes, None
        own, head = (None if part is None else part.mul_(grad_outputs[0]) for part in slopes)
        return own, head, *[None] * 4


def taught_loss(
    hidden: Tensor,
    master: Tensor,
    teacher: Teacher,
    taught: Sequence[Ints],
    weights: Sequence[float],
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`TaughtLoss` with types. No predictions give an exact zero.

    fused: by the kernel of `specd.drafts.taught_kernel`, on CUDA and with triton only.
    """
    total, counted, correct = TaughtLoss.apply(hidden, master, teacher, taught, weights, fused)  # type: ignore[no-untyped-call]
    return total, counted, correct


class _Inside(NamedTuple):
    """Of some tokens: 1 for each in the draft vocabulary, else 0, float32; and its place there, or any."""

    counts: Tensor
    places: Tensor


def _inside(tokens: Tensor, vocabulary: Tensor) -> _Inside:
    """Of `tokens`, in the ascending `vocabulary`."""
    places = torch.searchsorted(vocabulary, tokens).clamp_(max=vocabulary.shape[0] - 1)
    return _Inside((vocabulary[places] == tokens).float(), places)


def _teach(teacher: Teacher, rows: slice) -> tuple[Tensor, Tensor]:
    """The target's best token of some teacher rows, int64; and its distribution over the draft vocabulary, float32."""
    logits = teacher.states[rows] @ teacher.head.T
    best = logits.argmax(-1)
    return best, teacher.transform(logits.index_select(1, teacher.vocabulary).float()).softmax(-1)


def _fused(logits: Tensor, shares: Tensor, teachers: Tensor, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As `_plain`, by one kernel."""
    from specd.drafts.taught_kernel import score

    return score(logits, shares, teachers, places, weights)


def _plain(logits: Tensor, shares: Tensor, teachers: Tensor, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of some predictions, float32 [C], and 1 where the place of the teacher's best token is highest, else 0.

    shares: the teachers' distributions, float32 [·, W]. teachers, places: int64 [C], in `shares` and in the draft
    vocabulary. The logits [C, W] become weights · (softmax − shares).
    """
    logs, target = logits.float().log_softmax(-1), shares[teachers]
    losses = -(target * logs).sum(-1)
    right = logits.gather(1, places[:, None])[:, 0] >= logits.amax(-1)
    logits.copy_(logs.exp_().sub_(target).mul_(weights[:, None]))
    return losses, right.float()


def add_product(total: Tensor, slopes: Tensor, rows: Tensor) -> None:
    """Add slopesᵀ · rows to `total`, float32; on a GPU without rounding the product to their dtype first."""
    if rows.is_cuda and rows.dtype != total.dtype:
        total += torch.mm(slopes.T, rows, out_dtype=total.dtype)
    else:
        total += slopes.T @ rows
