"""A block draft as a drafter: one block of guesses a target forward."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.shape import as_fed
from specd.drafts.block_attention import BlockLayout, plain_attention
from specd.drafts.layers import KeyValue
from specd.errors import ConfigError

logger = logging.getLogger(__name__)


class BlockDrafter:
    """A trained block draft as a Drafter; its guesses are the most likely token of each place by itself.

    embedding, lm_head: the target's [V, H], in the dtype to compute in. embedding_scale: what the target makes of a
    row of its embedding, 0 where that is not known.
    """

    def __init__(self, draft: Backbone, embedding: Tensor, lm_head: Tensor, embedding_scale: float = 0.0) -> None:
        shape = draft.shape
        if embedding.shape != (shape.vocab_size, shape.hidden_size):
            raise ConfigError(
                f"the draft is for a target of vocabulary {shape.vocab_size} and hidden size {shape.hidden_size}, "
                f"this one has {embedding.shape[0]} and {embedding.shape[1]}: evaluate it with its own target"
            )
        if embedding_scale and not as_fed(shape, embedding_scale):
            logger.warning(
                "the draft wants rows of its target's embedding times %g (input_embedding_scale), which this target "
                "multiplies by %g: SGLang gives it the latter, so that its guesses are worse there than here",
                shape.input_embedding_scale, embedding_scale,
            )  # fmt: skip
        self._draft = draft.to(embedding.device)
        self._embedding, self._lm_head = embedding, lm_head
        self._cache: list[KeyValue] = []

    @property
    def taps(self) -> tuple[int, ...]:
        return self._draft.shape.taps

    @property
    def block_size(self) -> int:
        return self._draft.shape.num_guesses + 1

    def reset(self) -> None:
        self._cache = []

    def extend(self, tokens: Tensor, taps: Tensor) -> None:
        known = self._cache[0][0].shape[0] if self._cache else 0
        positions = torch.arange(known, known + taps.shape[0], device=taps.device)
        new = self._draft.context(taps.to(self._embedding.dtype), positions)
        # Only the context is kept: a block's own keys are guesses, and the target's states replace them.
        self._cache = [
            (torch.cat((old[0], more[0])), torch.cat((old[1], more[1])))
            for old, more in zip(self._cache, new, strict=True)
        ] if self._cache else new  # fmt: skip

    def propose(self, token: int) -> Tensor:
        shape, device = self._draft.shape, self._embedding.device
        known = self._cache[0][0].shape[0]
        starts, anchors = np.zeros(1, np.int64), np.full(1, known, np.int64)
        layout = BlockLayout(starts=starts, anchors=anchors, block_size=shape.block_size, num_context=known)
        tokens = torch.full((shape.block_size,), shape.mask_token_id, device=device)
        tokens[0] = token
        positions = torch.arange(known, known + shape.block_size, device=device)
        noise = self._draft.scaled(F.embedding(tokens, self._embedding))
        return self._guess(token, self._draft.block(noise, positions, self._cache, plain_attention(layout, device)))

    def _guess(self, token: int, states: Tensor) -> Tensor:
        """Guesses int64 [guesses] of a block's states [b, H], whose first token is `token`."""
        return F.linear(states[self._draft.shape.first :], self._lm_head).argmax(-1)
