"""The DSpark objective: the target's distribution, from each token of a block and the one before it.

Shape legend: N tokens of all blocks, b tokens a block, R predictions that count.
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
from specd.drafts.base import Loss, TargetParts, Tuning
from specd.drafts.blocks import Blocks
from specd.drafts.card import sglang, vllm
from specd.drafts.device import to_device
from specd.drafts.dspark.drafter import DSparkDrafter
from specd.drafts.dspark.loss import Teacher, distances
from specd.drafts.dspark.network import DSparkDraft, DSparkShape
from specd.drafts.dspark.settings import DSparkConfig
from specd.protocol.batch import Delivery

HEADS = {
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "sample_from_anchor": True,
}
"""Keys of config.json that say which DSpark it is."""
DSPARK = Form(
    "DSpark",
    ("Qwen3DSparkModel", "DSparkDraftModel", "DSparkSpeculator"),
    "dspark",
    shape=DSparkShape,
    network=DSparkDraft,
    drafter=DSparkDrafter,
    own=("markov_rank",),
    final=True,
    unbroken=True,
    only={key: (value,) for key, value in HEADS.items()}
    | {"is_causal": (False,), "causal": (False,), "projector_type": ("dspark",)},
)
"""Its other architectures are SpecForge's and Speculators' names."""


class DSpark(BlockObjective):
    """A DSpark draft and its loss.

    Every token of a block guesses the one behind it, given the text's own tokens. It learns the target's distribution
    (L1), the text (cross-entropy), and how much of its distribution the target would accept. A prediction counts up to
    the first token of its block that is no label.
    """

    form: ClassVar[Form] = DSPARK

    def __init__(
        self,
        config: DSparkConfig,
        target: TargetParts,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        tuning: Tuning | None = None,
    ) -> None:
        target.logit_transform()  # it needs the target's distribution
        super().__init__(config, target, device, dtype, seed, tuning)

    def score(self, delivery: Delivery, blocks: Blocks, states: Tensor) -> Loss:
        """See BlockObjective.score. accepted: what the target would accept of the draft's distribution, in the mean.

        confidence_error: how far the confidence head is from that.
        """
        config, draft, final = self.config, self.draft, delivery.final
        assert isinstance(config, DSparkConfig)
        assert isinstance(draft, DSparkDraft)
        assert final is not None, "the capture spec of a DSpark draft has the final state"
        known = delivery.batch.tokens[blocks.before].astype(np.int64)
        rows, labels, weights, tokens = (
            to_device(part, self.device) for part in (blocks.rows, blocks.labels, blocks.weights, known)
        )
        chosen, markov = states.index_select(0, rows), draft.markov_head
        before = markov.before(tokens, chosen.dtype)
        teacher = Teacher(
            self.lm_head,
            self.multiplied(final.detach().to(chosen.dtype)),
            draft.shape.final_logit_softcapping,
            config.ce_weight,
            config.l1_weight,
            config.loss_chunk,
            self.fused,
        )
        found = distances(
            self.multiplied(chosen),
            self.multiplied(before),
            markov.markov_w2.weight,
            teacher,
            blocks.before,
            labels,
            weights,
        )
        accepted = (1 - found.apart / 2).clamp(0, 1)
        confidence = draft.confidence_head(chosen, before)
        losses = F.binary_cross_entropy_with_logits(confidence, accepted, reduction="none")
        metrics = self.by_offset(
            blocks,
            rows,
            correct=found.correct,
            accepted=accepted,
            cross_entropy=found.cross_entropies,
            confidence_error=(confidence.detach().sigmoid() - accepted).abs(),
        )
        return Loss(found.total + config.confidence_weight * torch.dot(losses, weights), weights.sum(), metrics)

    def config_json(self) -> dict[str, Any]:
        """See BlockObjective.config_json. Both engines read its keys at the top."""
        config = draft_config(self.form, self.draft.shape, self.embedding.dtype)
        own = {name: getattr(self.draft.shape, name) for name in self.form.own}
        nested: dict[str, Any] = config.pop("dflash_config")
        return nested | config | own | HEADS

    def serving(self) -> dict[str, str]:
        """See BlockObjective.serving."""
        return {
            "SGLang, checked with 0.5.23": sglang(self._target, "--speculative-algorithm DSPARK"),
            "vLLM, checked with 0.33": vllm(self._target, "dspark", self.draft.shape.num_guesses),
        }
