"""The DFlash2 objective: DFlash's, and beside it the choice among the best tokens of each place.

Shape legend: N tokens of all blocks, b tokens a block, R predictions that count, K candidates.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from specd.drafts.backbone.export import draft_config
from specd.drafts.backbone.form import Form
from specd.drafts.backbone.objective import BlockObjective
from specd.drafts.backbone.weighting import weighted
from specd.drafts.base import Loss
from specd.drafts.blocks import Blocks
from specd.drafts.card import sglang, vllm
from specd.drafts.device import to_device
from specd.drafts.dflash2.drafter import DFlash2Drafter
from specd.drafts.dflash2.network import DFlash2Draft, DFlash2Shape
from specd.drafts.dflash2.settings import DFlash2Config
from specd.protocol.batch import Delivery

OWN = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
DFLASH2 = Form(
    "DFlash2",
    ("DFlash2DraftModel",),
    "dflash2",
    shape=DFlash2Shape,
    network=DFlash2Draft,
    drafter=DFlash2Drafter,
    own=OWN,
    only={"is_causal": (False,), "causal": (False,), "projector_type": ("dflash", "dflash2")},
)


class DFlash2(BlockObjective):
    """A DFlash2 draft and its loss.

    The selector chooses among the K best tokens of each place, given the text's own token before it. Where the label
    is not among them it is taught nothing, since serving offers it no others. Both terms have the weights that the
    head's likelihoods ask for, and one divisor.
    """

    form: ClassVar[Form] = DFLASH2

    def score(self, delivery: Delivery, blocks: Blocks, states: Tensor) -> Loss:
        """See BlockObjective.score. correct: what the selector picks, which is what is drafted; unary_correct: the
        head's own best; covered: labels among the candidates.
        """
        config, shape, draft = self.config, self.draft.shape, self.draft
        assert isinstance(config, DFlash2Config)
        assert isinstance(shape, DFlash2Shape)
        assert isinstance(draft, DFlash2Draft)
        known = delivery.batch.tokens[blocks.before].astype(np.int64)
        rows, labels, before = (to_device(part, self.device) for part in (blocks.rows, blocks.labels, known))
        chosen = states.index_select(0, rows)
        scores = self.read(chosen, labels, shape.selector_top_k)
        weights, total = weighted(config, blocks, scores.losses, rows)
        offered = scores.ids == labels[:, None]
        covered, slot = offered.any(-1), offered.int().argmax(-1)
        choice = scores.values + draft.candidate_selector(chosen, before, scores.ids)
        losses = F.cross_entropy(choice, slot, reduction="none")
        metrics = self.by_offset(
            blocks,
            rows,
            correct=covered & (choice.argmax(-1) == slot),
            unary_correct=scores.correct,
            covered=covered,
            cross_entropy=scores.losses.detach(),
        )
        selected = config.selector_weight * torch.dot(losses, weights * covered)
        return Loss(torch.dot(scores.losses, weights) + selected, total, metrics)

    def config_json(self) -> dict[str, Any]:
        """See BlockObjective.config_json."""
        shape = self.draft.shape
        config = draft_config(self.form, shape, self.embedding.dtype)
        config["dflash_config"] |= {"block_size": shape.block_size, **{name: getattr(shape, name) for name in OWN}}
        return config

    def serving(self) -> dict[str, str]:
        """See BlockObjective.serving."""
        return {
            "SGLang, 0.5.20 or later": sglang(self._target, "--speculative-algorithm DFLASH"),
            "vLLM, 0.33 or later, with its V2 model runner": vllm(self._target, "dflash", self.draft.shape.num_guesses),
        }
