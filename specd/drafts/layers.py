"""Layers that drafts share: float32 master weights, applied in the dtype of what comes in.

Shape legend: T context tokens, N tokens, H hidden size, D head size, Q query heads, K key-value heads.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of some tokens, each [tokens, K, D], keys already rotated."""
Rope = tuple[Tensor, Tensor]
"""Cosine and sine of some positions, each [tokens, 1, D / 2]."""


class Attend(Protocol):
    """Attention of all block tokens under the mask of blocks; see `specd.drafts.block_attention`."""

    def __call__(self, query: Tensor, block: KeyValue, context: KeyValue, window: int) -> Tensor:
        """query [N, Q, D], block keys and values of N tokens, context of T; window 0 is none. Returns [N, Q, D]."""
        ...


def rope_theta(config: dict[str, Any]) -> float:
    """Base frequency of a model's rotary embedding: newer configs keep it inside `rope_parameters`."""
    inside = config.get("rope_parameters") or {}
    return float(inside.get("rope_theta") or config.get("rope_theta") or 10000.0)


class Linear(nn.Module):
    """Bias-free linear map: float32 master weight [outputs, inputs], applied in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(size, inner)
        self.up_proj = Linear(size, inner)
        self.down_proj = Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        states: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return states


def rotations(positions: Tensor, theta: float, head_dim: int, dtype: torch.dtype) -> Rope:
    """Of positions [tokens], with the base frequency `theta`."""
    half = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = (positions.float()[:, None] * (1.0 / theta ** (half / head_dim)))[:, None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def draw(module: nn.Module, seed: int) -> None:
    """Fill the matrices of a draft from normal(0, 0.02), by `seed` alone; gains stay 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates x [tokens, heads, D] in the half-split convention of Qwen3 and Llama."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
