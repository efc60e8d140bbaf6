"""Gated delta nets for SGLang's CPU engine in plain torch: its own kernels for them need AMX and are not installed.

The environment of tests has this as `sgl_kernel.mamba`. Shapes: T tokens of sequences end to end, HK and HV heads of
keys and values, DK and DV their sizes, C channels of a convolution of width W.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float, dim: int) -> torch.Tensor:
    rows = x.reshape(-1, dim).float()
    scale = torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    return (rows * scale * (1 + weight.float())).to(x.dtype)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def fused_sigmoid_mul_cpu(x: torch.Tensor, gate: torch.Tensor, *_given: Any, **_named: Any) -> torch.Tensor:
    return x.mul_(gate.reshape(x.shape).sigmoid())


def fused_qk_gemma_rmsnorm_cpu(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _normed(q, q_weight, eps, dim), _normed(k, k_weight, eps, dim)


def fused_qk_gemma_rmsnorm_with_gate_cpu(
    q_gate: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    dim: int,
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, gate = torch.split(q_gate.view(q_gate.shape[0], heads, 2 * dim), dim, dim=-1)
    return _normed(q, q_weight, eps, dim), _normed(k, k_weight, eps, dim), gate.contiguous()


def fused_qkvzba_split_reshape_cat_contiguous_cpu(
    qkvz: torch.Tensor, ba: torch.Tensor, heads_k: int, heads_v: int, dim_k: int, dim_v: int
) -> tuple[torch.Tensor, ...]:
    qkv, z = torch.split(qkvz, [2 * heads_k * dim_k + heads_v * dim_v, heads_v * dim_v], dim=1)
    b, a = torch.split(ba, heads_v, dim=1)
    return qkv.contiguous(), z.reshape(-1, heads_v, dim_v).contiguous(), b.contiguous(), a.contiguous()


def fused_gdn_gating_cpu(
    a_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log of the decay, and beta: [1, T, HV] each, float32."""
    decay = -a_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid()[None]


def fused_rmsnorm_gated_cpu(x: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float) -> torch.Tensor:
    rows = x.float()
    normed = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (normed * functional.silu(gate.float())).to(x.dtype)


def causal_conv1d_fn_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    conv_states: torch.Tensor,
    has_initial_state: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: Sequence[int],
    **_named: Any,
) -> torch.Tensor:
    """x: [C, T]. weight: [C, W]. conv_states: [slots, C, W − 1], written in place."""
    out, kept = torch.empty_like(x), weight.shape[1] - 1
    starts = query_start_loc.tolist()
    for start, length, slot, known in zip(
        starts[: len(seq_lens_cpu)], seq_lens_cpu, cache_indices.tolist(), has_initial_state.tolist(), strict=True
    ):
        before = conv_states[slot] if known else torch.zeros_like(conv_states[slot])
        inputs = torch.cat([before.to(x.dtype), x[:, start : start + length]], dim=1)
        mixed = functional.conv1d(inputs[None], weight[:, None], bias, groups=weight.shape[0])[0]
        out[:, start : start + length] = functional.silu(mixed) if activation in ("silu", "swish") else mixed
        conv_states[slot] = inputs[:, -kept:].to(conv_states.dtype)
    return out


def chunk_gated_delta_rule_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state_indices: torch.Tensor | None = None,
    **_named: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, None]:
    """q, k: [1, T, HK, DK]. v: [1, T, HV, DV]. initial_state: [slots, HV, DK, DV], written in place given indices.

    All slots are read before any is written, as on a GPU, where sequences run side by side.
    """
    for module in ("sglang.kernels.ops", "sglang.srt.layers"):  # the norm behind it asks for AMX, or else for a GPU
        if (found := sys.modules.get(f"{module}.attention.fla.layernorm_gated")) is not None:
            found._use_cpu = True  # type: ignore[attr-defined]
    share, scale = v.shape[2] // q.shape[2], q.shape[3] ** -0.5
    queries, keys = (_unit(x[0].float()).repeat_interleave(share, dim=1) for x in (q, k))
    values, decays, out = v[0].float(), g[0].exp(), torch.empty_like(v)
    bounds = cu_seqlens.tolist()
    given = initial_state_indices is not None
    slots = torch.arange(len(bounds) - 1) if initial_state_indices is None else initial_state_indices.long()
    states = initial_state[slots].float()
    for state, start, end in zip(states, bounds, bounds[1:], strict=False):
        for t in range(start, end):
            state *= decays[t, :, None, None]
            wrong = values[t] - torch.einsum("hkv,hk->hv", state, keys[t])
            state += torch.einsum("hk,hv->hkv", keys[t], wrong * beta[0, t, :, None])
            out[0, t] = torch.einsum("hkv,hk->hv", state, queries[t] * scale).to(out.dtype)
    if not given:
        return out, states.to(initial_state.dtype), None
    initial_state[slots] = states.to(initial_state.dtype)
    return out, None, None


def _decoding(*_given: Any, **_named: Any) -> None:
    raise RuntimeError("there is no decoding in these tests")


causal_conv1d_update_cpu = fused_sigmoid_gating_delta_rule_update_cpu = _decoding

for _name, _found in list(globals().items()):
    if _name.endswith("_cpu"):
        setattr(torch.ops.sgl_kernel, _name, _found)
