"""What predictions weigh: by their offset in the block alone, or by how likely the draft is to get to them.

Shape legend: M blocks, b tokens a block, N = M·b, R predictions that count.
"""

from __future__ import annotations

import msgspec
import numpy as np
import torch
from torch import Tensor

from specd.drafts.backbone.settings import BlockConfig
from specd.drafts.blocks import Blocks
from specd.drafts.device import to_device
from specd.errors import ConfigError


def check_loss(config: BlockConfig) -> None:
    """Raise ConfigError for weights that cannot be, or a setting of those that were not chosen."""
    loss_decay(config)
    usual = {field.name: field.default for field in msgspec.structs.fields(config)}
    for name, loss in (("loss_decay", "decay"), ("dpace_alpha", "dpace")):
        if config.loss != loss and (value := getattr(config, name)) != usual[name]:
            raise ConfigError(
                f"draft.{name}={value}: it is of draft.loss={loss}, and this draft's is {config.loss}; "
                f"set draft.loss={loss}, or leave it out"
            )


def loss_decay(config: BlockConfig) -> float:
    """γ of the position weights; 0 is no decay. The paper takes 4, 5, 7 for blocks of 8, 10, 16; lines between."""
    if config.loss_decay >= 0:
        return config.loss_decay
    if config.loss_decay != -1:
        raise ConfigError(
            f"draft.loss_decay {config.loss_decay}: expected γ > 0, 0 for no decay, or -1 for the paper's"
        )
    size = config.block_size
    return size / 2 if size <= 10 else 7 + (size - 16) / 3


def weighted(config: BlockConfig, blocks: Blocks, losses: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights float32 [R] of predictions with these losses, without a gradient, and by what a step's sum is divided.

    rows: those of `blocks`, on the device. That is the sum of weights where they fall with the offset; else the number
    of blocks that predict anything: a draft that gets further weighs more as a whole, which is what it learns from.
    """
    if config.loss == "decay":
        weights = to_device(blocks.weights, losses.device)
        return weights, weights.sum()
    size = blocks.layout.block_size
    there = np.unique(blocks.rows // size).size
    total = to_device(np.array([there], np.float32), losses.device)[0]
    return dpace(losses.detach(), rows, len(blocks.tokens), size, config.dpace_alpha), total


def dpace(losses: Tensor, rows: Tensor, num_rows: int, block_size: int, alpha: float) -> Tensor:
    """Weights float32 [R] of D-PACE (arXiv 2605.18810): Σ_{m ≥ k} Π_{i ≤ m} (α + (1 − α) qᵢ) at offset k of a block.

    qᵢ is the likelihood of the label at offset i, exp(−loss). losses: [R]. rows: int64 [R], where they are among the
    num_rows = M·b. Offsets that do not count are left out of sum and product, which goes on behind them. With α = 0
    it would be the derivative of the expected number of accepted guesses by log q.
    """
    factor = losses.new_ones(num_rows).scatter(0, rows, alpha + (1 - alpha) * torch.exp(-losses))
    there = losses.new_zeros(num_rows).scatter(0, rows, torch.ones_like(losses))
    reached = factor.view(-1, block_size).cumprod(-1) * there.view(-1, block_size)
    return reached.flip(-1).cumsum(-1).flip(-1).view(-1).index_select(0, rows)
