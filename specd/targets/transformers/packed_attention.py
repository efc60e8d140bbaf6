"""Causal attention inside each of several sequences packed end to end, for transformers' AttentionInterface."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

ATTENTION = "specd_packed"
"""The name under which `packed_attention` is registered with transformers."""

SHORT_TOKENS = 512
"""Mean length below which one varlen kernel beats a loop of sdpa calls on a GPU. Qwen3-30B-A3B on an H200: 128 × 48
tokens 201 against 246 ms, 16 × 512 alike, 1 × 12,288 525 against 447 (sdpa has the faster kernel there)."""


PLAIN = frozenset({
    "dropout", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "output_router_logits", "logits_to_keep", "layer_idx",
})  # fmt: skip
"""Keyword arguments of an attention layer that say nothing about which token sees which."""


class Unpackable(Exception):
    """Why an attention layer cannot run packed sequences; its model can run them one by one.

    eager: only transformers' own eager attention computes what the layer asks for.
    """

    def __init__(self, why: str, *, eager: bool = False) -> None:
        super().__init__(why)
        self.eager = eager


class Packed:
    """How the tokens of one forward divide into sequences; travels as a keyword argument to every attention layer.

    bounds: where each sequence begins, and the end. offsets: the same on the GPU, if its varlen kernel is to be used.
    seen: whether any attention layer used it. windowed: whether any named a window.
    """

    __slots__ = ("bounds", "longest", "masks", "offsets", "seen", "windowed")

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.bounds = tuple(accumulate(lengths, initial=0))
        self.longest = max(lengths)
        short = device.type == "cuda" and self.bounds[-1] < SHORT_TOKENS * len(lengths) and len(lengths) > 1
        self.offsets = torch.tensor(self.bounds, dtype=torch.int32, device=device) if short else None
        self.masks: dict[tuple[int, int], torch.Tensor] = {}
        self.seen = self.windowed = False

    def window_mask(self, length: int, window: int, device: torch.device) -> torch.Tensor:
        """bool [length, length]: the last `window` tokens up to each, made once a forward for all layers."""
        if (length, window) not in self.masks:
            position = torch.arange(length, device=device)
            back = position[:, None] - position[None, :]
            self.masks[length, window] = (back >= 0) & (back < window)
        return self.masks[length, window]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: Packed | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend inside each of the packed sequences; signature and layouts as AttentionInterface wants them.

    query: [1, heads, T, head_dim]. key, value: [1, kv_heads, T, …]. Returns [1, T, heads, head_dim]. No mask function
    is registered under this name, so transformers makes no mask. Raises Unpackable for whatever else a layer wants.
    """
    if softcap is not None or s_aux is not None:
        raise Unpackable("its attention has soft-capping or sinks, which sdpa has not", eager=True)
    if packed is None:
        raise Unpackable("its attention is not told which tokens are one sequence")
    if attention_mask is not None:
        raise Unpackable("its attention makes a mask of its own")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise Unpackable("its attention is not causal")
    if strange := sorted(key for key, value in others.items() if value is not None and key not in PLAIN):
        raise Unpackable(f"its attention wants {', '.join(strange)}")
    packed.seen = True
    packed.windowed |= sliding_window is not None
    half = query.dtype in (torch.bfloat16, torch.float16) and value.shape[-1] == query.shape[-1] <= 256
    varlen = _varlen_attention() if packed.offsets is not None and half else None
    if varlen is not None:
        left = -1 if sliding_window is None else sliding_window - 1
        out: torch.Tensor = varlen(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            packed.offsets,
            packed.offsets,
            packed.longest,
            packed.longest,
            scale=scaling,
            window_size=(left, 0),
        )
        return out[None], None
    pieces = []
    for start, end in pairwise(packed.bounds):
        window = sliding_window if sliding_window is not None and sliding_window < end - start else None
        mask = packed.window_mask(end - start, window, query.device) if window else None
        piece = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        pieces.append(piece.transpose(1, 2))
    return (pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=1)), None


@functools.cache
def _varlen_attention() -> Callable[..., Any] | None:
    """torch's flash attention over packed sequences; None where it is missing or knows no windows (before 2.11)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    knows = inspect.signature(varlen_attn).parameters
    if "enable_gqa" in knows:  # without it, grouped queries need no flag
        return functools.partial(varlen_attn, enable_gqa=True)
    return varlen_attn if "window_size" in knows else None
