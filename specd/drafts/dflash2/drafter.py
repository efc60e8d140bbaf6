"""DFlash2 as a drafter: one walk through the best tokens of each place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from specd.drafts.backbone.drafter import BlockDrafter
from specd.drafts.dflash2.network import DFlash2Draft, DFlash2Shape
from specd.drafts.logits import LogitTransform


class DFlash2Drafter(BlockDrafter):
    """A trained DFlash2 draft as a Drafter. A BlockDrafter of it leaves the selector out."""

    def _guess(self, token: int, states: Tensor) -> Tensor:
        draft, shape = self._draft, self._draft.shape
        assert isinstance(draft, DFlash2Draft)
        assert isinstance(shape, DFlash2Shape)
        transform = LogitTransform(shape.output_multiplier, shape.final_logit_softcapping)
        products, candidates = F.linear(states[1:], self._lm_head).float().topk(shape.selector_top_k, -1)
        scores = transform(products)
        chosen = torch.full((shape.block_size,), token, device=states.device)
        for place in range(shape.block_size - 1):
            gained = draft.candidate_selector(states[place + 1, None], chosen[place, None], candidates[place, None])[0]
            chosen[place + 1] = candidates[place].take((scores[place] + gained).argmax())
        return chosen[1:]
