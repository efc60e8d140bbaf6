"""Loss of a trained head against a frozen one: the target's distribution over the draft vocabulary, chunk by chunk.

Shape legend: U teacher rows, P predictions, H hidden size, V target vocabulary, W draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specd.drafts.device import to_device
from specd.drafts.logits import LogitTransform

Ints = NDArray[np.int64]


class Teacher(NamedTuple):
    """A target and what it says. head: its lm_head [V, H], frozen. vocabulary: ids int64 [W] that the draft guesses.

    states: its final states [U, H]. chunk: of them, whose logits exist at a time.
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
        ctx: Any, hidden: Tensor, master: Tensor, teacher: Teacher, taught: Sequence[Ints], weights: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [P, H]: the states of all steps, one step after the other. master: the head, float32 [W, H].

        taught: for each step the teacher of each of its predictions, ascending. weights: of each step.
        Returns the weighted sum, float32; and for each step, float32 [steps]: how many were counted, those whose
        teacher's best token is in the draft vocabulary; and how many of them guessed it.
        """
        head, device = master.to(hidden.dtype), hidden.device
        sums, counted, correct = torch.zeros(3, len(taught), device=device)
        grad = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(master) if ctx.needs_input_grad[1] else None
        begins = np.cumsum([0, *(places.size for places in taught)]).tolist()
        cuts = np.arange(0, teacher.states.shape[0] + teacher.chunk, teacher.chunk)
        bounds = [np.searchsorted(places, cuts).tolist() for places in taught]
        teachers = [to_device(places, device) for places in taught]
        for index, cut in enumerate(cuts[:-1].tolist()):
            best, shares = _teach(teacher, slice(cut, cut + teacher.chunk))
            inside = _inside(best, teacher.vocabulary)
            for step, places in enumerate(teachers):
                low, high = bounds[step][index], bounds[step][index + 1]
                if low == high:
                    continue
                rows, of = slice(begins[step] + low, begins[step] + high), places[low:high] - cut
                counts, target = inside[of], shares[of]
                logs = (hidden[rows] @ head.T).float().log_softmax(-1)
                sums[step] -= ((target * logs).sum(-1) * counts).sum()
                counted[step] += counts.sum()
                correct[step] += ((teacher.vocabulary[logs.argmax(-1)] == best[of]) * counts).sum()
                slope = ((logs.exp_() - target) * (weights[step] * counts)[:, None]).to(head.dtype)
                if grad is not None:
                    torch.mm(slope, head, out=grad[rows])
                if grad_head is not None:
                    grad_head += slope.T @ hidden[rows]
        ctx.save_for_backward(grad, grad_head)
        ctx.mark_non_differentiable(counted, correct)
        return torch.dot(sums, to_device(np.array(weights, np.float32), device)), counted, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad, grad_head = ctx.saved_tensors
        own, heads = (None if part is None else part * grad_outputs[0] for part in (grad, grad_head))
        return own, heads, None, None, None


def taught_loss(
    hidden: Tensor, master: Tensor, teacher: Teacher, taught: Sequence[Ints], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """`TaughtLoss` with types. No predictions give an exact zero."""
    total, counted, correct = TaughtLoss.apply(hidden, master, teacher, taught, weights)  # type: ignore[no-untyped-call]
    return total, counted, correct


def _inside(tokens: Tensor, vocabulary: Tensor) -> Tensor:
    """1 for each token in the ascending `vocabulary`, else 0, float32."""
    place = torch.searchsorted(vocabulary, tokens).clamp_(max=vocabulary.shape[0] - 1)
    return (vocabulary[place] == tokens).float()


def _teach(teacher: Teacher, rows: slice) -> tuple[Tensor, Tensor]:
    """The target's best token of some teacher rows, int64; and its distribution over the draft vocabulary, float32."""
    logits = teacher.states[rows] @ teacher.head.T
    best = logits.argmax(-1)
    return best, teacher.transform(logits[:, teacher.vocabulary].float()).softmax(-1)
