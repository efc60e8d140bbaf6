"""A tiny DFlash2 draft beside the target of `drafts`, with weights of which all matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from drafts import parts
from specd.drafts.base import Tuning
from specd.drafts.dflash2.objective import DFlash2
from specd.drafts.dflash2.settings import DFlash2Config

CONFIG = DFlash2Config(
    num_layers=2, num_taps=3, block_size=5, num_anchors=5, loss_chunk=7, mask_token_id=3, conv_group_size=8,
    selector_rank=6, selector_top_k=30,
)  # fmt: skip


def make_dflash2(
    config: DFlash2Config = CONFIG,
    seed: int = 0,
    tuning: Tuning | None = None,
    figures: Mapping[str, Any] | None = None,
) -> DFlash2:
    """A fresh one. figures: changes of its target's contract."""
    return DFlash2(config, parts(figures=figures), seed=seed, tuning=tuning)


def strong(objective: DFlash2, seed: int = 9) -> DFlash2:
    """With other weights, far from those of a start: convolutions that mix, a selector that decides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in objective.module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.25 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
        for name, parameter in objective.module.named_parameters():
            if name.endswith("base_kernel"):
                parameter[:, 0] += 1
            if name.endswith("codebook"):
                parameter.mul_(4)
    return objective
