"""A tiny DSpark draft beside the target of `drafts`, with weights of which all matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from drafts import HIDDEN, MASK, parts
from drafts import deliver as with_taps
from specd.drafts.base import Tuning
from specd.drafts.dspark.objective import DSpark
from specd.drafts.dspark.settings import DSparkConfig
from specd.protocol.batch import Batch, Delivery

CONFIG = DSparkConfig(
    num_layers=2, num_taps=3, block_size=5, num_anchors=5, loss_chunk=7, mask_token_id=MASK, markov_rank=6
)


def make_dspark(
    config: DSparkConfig = CONFIG,
    seed: int = 0,
    tuning: Tuning | None = None,
    figures: Mapping[str, Any] | None = None,
) -> DSpark:
    """A fresh one. figures: changes of its target's contract."""
    return DSpark(config, parts(figures=figures), seed=seed, tuning=tuning)


def deliver(batch: Batch, seed: int = 2) -> Delivery:
    """A batch with three taps and the final state."""
    final = torch.randn(batch.num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed + 1))
    return Delivery(batch, with_taps(batch, seed=seed).taps, final)


def strong(objective: DSpark, seed: int = 9) -> DSpark:
    """With other weights, far from those of a start: a Markov head that decides, a confidence that differs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in objective.module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
            if name.startswith("markov_head"):
                parameter.mul_(4)
    return objective
