"""The DFlash objective: every token of a block by itself, from the state at its place (arXiv 2602.06036)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specd.drafts.backbone.export import draft_config
from specd.drafts.backbone.form import DFLASH, Form
from specd.drafts.backbone.objective import BlockObjective
from specd.drafts.backbone.weighting import weighted
from specd.drafts.base import Loss
from specd.drafts.blocks import Blocks
from specd.drafts.card import sglang, vllm
from specd.drafts.device import to_device
from specd.protocol.batch import Delivery


class DFlash(BlockObjective):
    """A DFlash draft and its loss."""

    form: ClassVar[Form] = DFLASH

    def score(self, delivery: Delivery, blocks: Blocks, states: Tensor) -> Loss:
        """See BlockObjective.score."""
        rows, labels = to_device(blocks.rows, self.device), to_device(blocks.labels, self.device)
        scores = self.read(states.index_select(0, rows), labels)
        weights, total = weighted(self.config, blocks, scores.losses, rows)
        metrics = self.by_offset(blocks, rows, correct=scores.correct, cross_entropy=scores.losses.detach())
        return Loss(torch.dot(scores.losses, weights), total, metrics)

    def config_json(self) -> dict[str, Any]:
        """See BlockObjective.config_json."""
        return draft_config(self.form, self.draft.shape, self.embedding.dtype)

    def serving(self) -> dict[str, str]:
        """See BlockObjective.serving."""
        shape = self.draft.shape
        least = "0.5.18" if shape.is_causal is False and "sliding_attention" in shape.layer_types else "0.5.14"
        return {
            f"SGLang, {least} or later": sglang(self._target, "--speculative-algorithm DFLASH"),
            "vLLM, 0.33 or later": vllm(self._target, "dflash", self.draft.shape.num_guesses),
        }
