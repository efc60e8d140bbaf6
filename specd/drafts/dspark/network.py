"""The DSpark network: the backbone, a Markov head that joins its guesses, and a head that says how sure they are.

Shape legend: H hidden size, V vocabulary, R rows, r rank. Module names are those of published checkpoints, so state
dicts travel both ways.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.shape import BlockShape
from specd.drafts.layers import Linear, beside, draw, lookup


class DSparkShape(BlockShape, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Of a DSpark draft; see `DSparkConfig`. Its config.json always says whether it is causal."""

    names_causal: ClassVar[bool] = True
    first: ClassVar[int] = 0
    markov_rank: int

    def problem(self) -> str | None:
        """Why no draft of this shape can exist, or None if it can."""
        if self.markov_rank < 1:
            return f"markov_rank {self.markov_rank}: expected a positive number"
        return super().problem()


class MarkovHead(nn.Module):
    """What a token's logit gains from the token before it, of low rank: W2 · W1[before]. At first nothing."""

    def __init__(self, shape: DSparkShape, seed: int) -> None:
        super().__init__()
        table = torch.empty(shape.vocab_size, shape.markov_rank, dtype=torch.float32)
        self.markov_w1 = nn.Embedding.from_pretrained(table, freeze=False)  # type: ignore[no-untyped-call]
        self.markov_w2 = Linear(shape.markov_rank, shape.vocab_size)
        draw(self, seed)
        with torch.no_grad():
            self.markov_w2.weight.zero_()

    def before(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Tokens int64 [R] -> their rows of W1 [R, r]."""
        # Looked up and then rounded: the table is as long as the vocabulary.
        return lookup(self.markov_w1.weight, tokens).to(dtype)


class ConfidenceHead(nn.Module):
    """How likely a guess is to be accepted, as a logit in float32, as engines compute it. At first 0: one half."""

    def __init__(self, shape: DSparkShape) -> None:
        super().__init__()
        self.proj = Linear(shape.hidden_size + shape.markov_rank, 1, bias=True)
        with torch.no_grad():
            self.proj.weight.zero_()

    def forward(self, states: Tensor, before: Tensor) -> Tensor:
        """States [R, H] and rows of W1 [R, r] -> logits [R]."""
        logits: Tensor = self.proj(torch.cat((states, before), -1).float())
        return logits[:, 0]


class DSparkDraft(Backbone):
    """The trainable draft. It begins with the backbone's own guesses: a Markov head and a confidence of no opinion."""

    def __init__(self, shape: BlockShape, seed: int = 0) -> None:
        super().__init__(shape, seed)
        assert isinstance(shape, DSparkShape)
        self.markov_head = MarkovHead(shape, beside(seed))
        self.confidence_head = ConfidenceHead(shape)
