"""What attentions by torch's flex_attention share: when it is used, whole tiles, masks whose tiles the host chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from specd.config.settings import AttentionKind
from specd.drafts.device import to_device
from specd.errors import ConfigError

TILE = 128
"""Rows and columns of a tile of flex_attention's block mask."""
INSTEAD = "draft.attention=sdpa trains without them, but slower"
"""What a machine without a compiler is told."""
SMALLEST_HEAD = 16
"""Of flex_attention's kernels."""

Bools = NDArray[np.bool_]
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Batch, head, row and key -> whether the row sees the key."""


def uses_flex(kind: AttentionKind, device: torch.device) -> bool:
    """Whether `kind` means flex_attention on that device."""
    return kind == "flex" or (kind == "auto" and device.type == "cuda")


def trains_by_flex(kind: AttentionKind, head_dim: int, device: torch.device) -> bool:
    """Whether a draft with heads of that size is trained by flex_attention. Raises ConfigError where it cannot be."""
    if kind == "flex" and device.type != "cuda":
        raise ConfigError(f"draft.attention=flex on {device}: torch has its gradients on GPUs only; use auto or sdpa")
    return uses_flex(kind, device) and not (kind == "auto" and head_dim < SMALLEST_HEAD)


def in_whole_tiles(size: int) -> int:
    """`size` rows in whole tiles; two at least, because compilers take a length of one tile for a special case."""
    return max(2, -(-size // TILE)) * TILE


def in_tiles(x: Tensor, size: int) -> Tensor:
    """[rows, heads, D], filled up with zeros to `size` rows -> [tiles, TILE, heads, D]."""
    missing = size - x.shape[0]
    whole = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
    return whole.reshape(-1, TILE, *x.shape[1:])


def tiled_mask(partial: Bools, full: Bools, visible: Visible, device: torch.device, copies: int = 1) -> Any:
    """flex_attention's BlockMask of the tiles bool [query tiles, key tiles] to visit with `visible`, and to take whole.

    visible: of tensors only, no Python numbers: those would be compiled in, and every new batch would compile again.
    copies: the size of its batch.
    """
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices, full_counts, full_indices = (
        to_device(part, device).repeat(copies, *[1] * (part.ndim - 1))
        for chosen in (partial, full)
        for part in _tile_lists(chosen)
    )
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=TILE,
        mask_mod=visible,
        seq_lengths=(TILE * partial.shape[0], TILE * partial.shape[1]),
    )


def _tile_lists(chosen: Bools) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """bool [query tiles, key tiles] -> counts [1, 1, query tiles] and, chosen first, key tiles [1, 1, …, key tiles]."""
    order = np.argsort(~chosen, axis=1, kind="stable")
    return chosen.sum(1, dtype=np.int32)[None, None], order.astype(np.int32)[None, None]
