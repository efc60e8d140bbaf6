"""Layers that drafts share: float32 master weights, applied in the dtype of what comes in.

Shape legend: T context tokens, N tokens, H hidden size, D head size, Q query heads, K key-value heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from specd.drafts.rope import Scaling, frequencies

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of some tokens, each [tokens, K, D], keys already rotated."""
Rope = tuple[Tensor, Tensor]
"""Cosine and sine of some positions, each [tokens, 1, D / 2]."""


class Attend(Protocol):
    """Attention of all block tokens under the mask of blocks; see `specd.drafts.block_attention`."""

    def __call__(self, query: Tensor, block: KeyValue, context: KeyValue, window: int, causal: bool = False) -> Tensor:
        """query [N, Q, D], block keys and values of N tokens, context of T -> [N, Q, D].

        window: positions back that a token sees, 0 for all. causal: of its own block it sees what is before it.
        """
        ...


class Linear(nn.Module):
    """Linear map: float32 master weight [outputs, inputs], applied in the dtype of its input. bias: zero at first.

    rounded: its weight in the dtype that it is applied in, where several calls share it; see `sharing`.
    """

    bias: nn.Parameter | None
    rounded: Tensor | None = None

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=torch.float32))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs, dtype=torch.float32)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) if self.rounded is None else self.rounded
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def lookup(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of a trained table [V, r] for ids [...] -> [..., r], with the same gradient to the bit from call to call."""
    found: Tensor = _Lookup.apply(table, ids) if table.is_cuda else F.embedding(ids, table)  # type: ignore[no-untyped-call]
    return found


class _Lookup(torch.autograd.Function):
    """Where a row is looked up many times, CUDA's backward of an embedding adds in a changing order (torch 2.11).

    `index_put_` there adds in a fixed one; on a CPU it is the other way round.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        (ids,), (grad,) = ctx.saved_tensors, grad_outputs
        return grad.new_zeros(ctx.shape).index_put_((ids,), grad, accumulate=True), None


@contextlib.contextmanager
def sharing(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Every Linear in `module` rounds its weight to `dtype` once for all calls within, and keeps one copy for backward.

    Their gradients are then summed in `dtype` over the calls.
    """
    linears = [part for part in module.modules() if isinstance(part, Linear) and part.weight.dtype != dtype]
    for linear in linears:
        linear.rounded = linear.weight.to(dtype)
        torch._dynamo.mark_static(linear.rounded)
    try:
        yield
    finally:
        for linear in linears:
            linear.rounded = None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, with a gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float32))
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


class Rotations(nn.Module):
    """Cosine and sine of positions. theta: base frequency. scaling: for long texts, None for none."""

    inverse: Tensor | None

    def __init__(
        self, theta: float, scaling: Scaling | None, head_dim: int, num_heads: int, max_positions: int
    ) -> None:
        super().__init__()
        self.theta, self.head_dim, self.factor, inverse = theta, head_dim, 1.0, None
        if scaling is not None:
            inverse, self.factor = frequencies(theta, scaling, head_dim, num_heads, max_positions)
        self.register_buffer("inverse", inverse, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """Of positions [tokens]."""
        inverse = self.inverse
        if inverse is None:
            half = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=torch.float32)
            inverse = 1.0 / self.theta ** (half / self.head_dim)
        angles = (positions.float()[:, None] * inverse)[:, None, :]
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)


def draw(module: nn.Module, seed: int) -> None:
    """Fill the matrices of a draft from normal(0, 0.02), by `seed` alone; gains stay 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)


def beside(seed: int) -> int:
    """Another seed, for parts beside those that `seed` fills."""
    return int(np.random.SeedSequence([seed % 2**64, 1]).generate_state(1)[0])


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates x [tokens, heads, D] in the half-split convention of Qwen3 and Llama."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
