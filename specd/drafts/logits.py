"""From products of a target's final states with its lm_head to its logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """What a target does to these products, as its contract says it. softcap: 0 for none."""

    scale: float = 1.0
    softcap: float = 0.0

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [rows, V] float32 -> the target's logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits
