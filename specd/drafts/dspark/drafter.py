"""DSpark as a drafter: the head's logits of a block at once, and a walk through it by the token before each place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from specd.drafts.backbone.drafter import BlockDrafter
from specd.drafts.dspark.network import DSparkDraft


class DSparkDrafter(BlockDrafter):
    """A trained DSpark draft as a Drafter. A BlockDrafter of it leaves the Markov head out."""

    def _guess(self, token: int, states: Tensor) -> Tensor:
        # What is done to logits afterwards, a factor or a soft-cap, is done to the sum and moves no best token.
        assert isinstance(self._draft, DSparkDraft)
        markov, alone = self._draft.markov_head, F.linear(states, self._lm_head).float()
        second = markov.markov_w2.weight.to(states.dtype)
        chosen = torch.full((len(states) + 1,), token, device=states.device)
        for place, logits in enumerate(alone):
            gained = F.linear(markov.before(chosen[place, None], states.dtype), second)[0]
            chosen[place + 1] = (logits + gained.float()).argmax()
        return chosen[1:]
