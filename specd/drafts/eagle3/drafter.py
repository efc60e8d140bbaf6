"""EAGLE-3 as a drafter: a chain of guesses, each from the state of the one before."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.drafts.eagle3.attention import plain_attention
from specd.drafts.eagle3.model import Eagle3Draft
from specd.drafts.layers import KeyValue
from specd.drafts.taps import eagle3_taps
from specd.errors import ConfigError

logger = logging.getLogger(__name__)


class Eagle3Drafter:
    """A trained EAGLE-3 draft as a Drafter. embedding: the target's [V, H], in the dtype to compute in.

    num_layers: of the target, for a draft that names no layers; it reads those that engines take then.
    A row pairs the taps of one token with the embedding of the next, so that of the text's last token waits for it.
    """

    def __init__(self, draft: Eagle3Draft, embedding: Tensor, num_layers: int = 0) -> None:
        shape = draft.shape
        if embedding.shape != (shape.vocab_size, shape.hidden_size):
            raise ConfigError(
                f"the draft is for a target of vocabulary {shape.vocab_size} and hidden size {shape.hidden_size}, "
                f"this one has {embedding.shape[0]} and {embedding.shape[1]}: evaluate it with its own target"
            )
        if not (shape.taps or num_layers):
            raise ConfigError("the draft names no layers of its target: expected the number of its target's layers")
        self._taps = shape.taps or eagle3_taps(num_layers)
        if not draft.suits(embedding):
            logger.warning(
                "the draft's directory has an embedding of its own, which is not its target's: the target's is used, "
                "as in SGLang, while vLLM takes the draft's; its guesses may be worse than there"
            )
        self._draft = draft.to(embedding.device)
        self._embedding = embedding
        self._waiting: Tensor | None = None
        self._context: KeyValue | None = None

    @property
    def taps(self) -> tuple[int, ...]:
        return self._taps

    @property
    def block_size(self) -> int:
        return self._draft.shape.num_steps + 1

    def reset(self) -> None:
        self._waiting = self._context = None

    def extend(self, tokens: Tensor, taps: Tensor) -> None:
        states = self._draft.enter(taps.to(self._embedding.dtype))
        if self._waiting is not None:
            states = torch.cat((self._waiting, states))
        else:
            tokens = tokens[1:]  # nothing is known of what was before the first token
        self._waiting = states[-1:]
        if tokens.shape[0]:
            _, own, _ = self._row(tokens, states[:-1], self._known)
            self._context = self._with(own)

    def propose(self, token: int) -> Tensor:
        states, later, guesses = self._waiting, [], []
        assert states is not None, "the text has a token at least"
        context, known = self._context, self._known
        rows, attend = np.array([known]), plain_attention(np.zeros(known + 1, np.int64))
        for step in range(self._draft.shape.num_steps):
            tokens = torch.tensor([token], device=self._embedding.device)
            query, own, residual = self._row(tokens, states, known + step)
            if step:
                later.append(own)
            else:
                context = self._with(own)
            assert context is not None, "it has the row just added"
            attended = attend(query, rows, context, later)
            states, read = self._draft.after(residual, attended)
            token = int(self._draft.vocabulary[self._draft.lm_head(read).argmax(-1)])
            guesses.append(token)
        return torch.tensor(guesses)

    @property
    def _known(self) -> int:
        return self._context[0].shape[0] if self._context else 0

    def _row(self, tokens: Tensor, states: Tensor, position: int) -> tuple[Tensor, KeyValue, Tensor]:
        """Queries, keys and values of rows from `position` on, and their states."""
        positions = torch.arange(position, position + tokens.shape[0], device=tokens.device)
        rope = self._draft.rope(positions, states.dtype)
        joined, keys, values = self._draft.keyed(F.embedding(tokens, self._embedding), states, rope)
        return self._draft.queries(joined, rope), (keys, values), states

    def _with(self, own: KeyValue) -> KeyValue:
        """The context with more rows behind it."""
        if self._context is None:
            return own
        return torch.cat((self._context[0], own[0])), torch.cat((self._context[1], own[1]))
