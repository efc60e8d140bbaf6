"""Attention of packed blocks: each sees its own sequence strictly before its anchor, and all of itself.

A layer may restrict both: to a window of positions back, and causally, to what is before a token in its own block.

Two implementations of one mask: flex_attention for GPUs, and plain torch ops sequence by sequence for anything else.
Shape legend: M blocks, b tokens a block, N = M·b, T context tokens, C context tokens of one sequence, A its blocks,
Q query heads, K key-value heads, G = Q / K, D head size. For flex_attention's kernels T and N are filled up to whole
tiles, T' and N'.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from specd.config.settings import AttentionKind
from specd.drafts.compile import compiled
from specd.drafts.device import Ints, to_device
from specd.drafts.flex import INSTEAD, TILE, in_tiles, in_whole_tiles, tiled_mask, uses_flex
from specd.drafts.layers import Attend, KeyValue


class BlockLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Where the blocks of one packed batch stand, known on the host so that no mask ever waits for the device.

    starts: int64 [M], where in the packed context the block's sequence starts. anchors: int64 [M], where its anchor
    is. Blocks of a sequence are adjacent, sequences in context order. num_context: T.
    """

    starts: Ints
    anchors: Ints
    block_size: int
    num_context: int

    def visible_from(self, window: int) -> Ints:
        """int64 [M, b]: the first context index each block token sees. window: positions back, 0 for all."""
        positions = self.anchors[:, None] + np.arange(self.block_size)
        if not window:
            return np.broadcast_to(self.starts[:, None], positions.shape)
        first: Ints = np.maximum(self.starts[:, None], positions - window + 1)
        return first

    def seen_inside(self, causal: bool) -> Ints:
        """int64 [b]: how many tokens of its block, from the anchor on, each block token sees."""
        size = self.block_size
        return np.arange(1, size + 1) if causal else np.full(size, size)


def block_attention(kind: AttentionKind, layout: BlockLayout, device: torch.device, spread: bool = True) -> Attend:
    """The attention of `layout`'s blocks. `auto` is flex on CUDA and the plain path elsewhere.

    spread: see flex_attention.
    """
    if uses_flex(kind, device):
        return flex_attention(layout, device, spread)
    return plain_attention(layout, device)


def plain_attention(layout: BlockLayout, device: torch.device) -> Attend:
    """Attention in plain torch ops, one sequence after the other: no score between sequences or blocks is computed."""
    edges = np.flatnonzero(np.diff(layout.starts)) + 1
    groups = [g for g in np.split(np.arange(len(layout.starts)), edges) if g.size]

    @functools.cache
    def masks(window: int) -> list[Tensor]:
        """Per sequence: bool [A, b or 1, 1, C], True where a context token is hidden."""
        first, found = layout.visible_from(window), []
        for group in groups:
            anchors = layout.anchors[group]
            index = np.arange(int(layout.starts[group[0]]), int(anchors.max()))
            hidden = index >= anchors[:, None, None]
            if window:
                hidden = hidden | (index < first[group][:, :, None])
            found.append(to_device(hidden[:, :, None, :], device))
        return found

    later = to_device(np.arange(layout.block_size) >= layout.seen_inside(True)[:, None], device)

    def attend(query: Tensor, block: KeyValue, context: KeyValue, window: int, causal: bool = False) -> Tensor:
        b, outputs = layout.block_size, []
        for group, hidden in zip(groups, masks(window), strict=True):
            seen = slice(int(layout.starts[group[0]]), int(layout.anchors[group].max()))
            rows = slice(int(group[0]) * b, (int(group[-1]) + 1) * b)
            own = (block[0][rows], block[1][rows])
            behind = later if causal else None
            outputs.append(_sequence(query[rows], own, (context[0][seen], context[1][seen]), hidden, behind, b))
        return torch.cat(outputs)

    return attend


def _sequence(
    query: Tensor, block: KeyValue, context: KeyValue, hidden: Tensor, behind: Tensor | None, b: int
) -> Tensor:
    """Blocks of one sequence: query [A·b, Q, D], block keys [A·b, K, D], context keys [C, K, D] -> [A·b, Q, D].

    hidden: of the context, see plain_attention. behind: bool [b, b], True where a token of the block is hidden, if any.
    The scores against the context are one product for all blocks, those inside blocks one small product a block;
    one softmax runs over both.
    """
    rows, num_heads, head_dim = query.shape
    kv, length, blocks = block[0].shape[1], context[0].shape[0], rows // b
    group = num_heads // kv
    grouped = (query * head_dim**-0.5).view(blocks, b, kv, group, head_dim).permute(2, 0, 1, 3, 4)
    q = grouped.reshape(kv, rows * group, head_dim)
    own_k, own_v = (x.view(blocks, b, kv, head_dim).permute(2, 0, 1, 3) for x in block)
    context_k, context_v = (x.transpose(0, 1) for x in context)

    far = (q @ context_k.mT).view(kv, blocks, b, group, length).masked_fill(hidden, -math.inf)
    near = q.view(kv, blocks, b * group, head_dim) @ own_k.mT
    if behind is not None:
        near = near.masked_fill(behind.repeat_interleave(group, 0), -math.inf)
    scores = torch.cat((far.view(kv, blocks, b * group, length), near), dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)

    out = weights[..., :length].reshape(kv, rows * group, length) @ context_v
    out = out.view(kv, blocks, b * group, head_dim) + weights[..., length:] @ own_v
    return out.view(kv, blocks, b, group, head_dim).permute(1, 2, 0, 3, 4).reshape(rows, num_heads, head_dim)


def flex_attention(layout: BlockLayout, device: torch.device, spread: bool = True) -> Attend:
    """Attention by torch's flex_attention: compiled on CUDA; elsewhere interpreted and without gradients.

    spread: query heads that share keys go as a batch over one set of keys, instead of as groups of heads. In the
    backward, one program then sums the gradient of a tile of keys over the rows of one head and not of all G, and long
    sequences do not end in a few programs that are still busy.
    """
    masks = functools.cache(lambda window, causal, copies: block_mask(layout, window, device, copies, causal))
    kernel = compiled(_flex, INSTEAD) if device.type == "cuda" else _flex
    rows, context_rows = in_whole_tiles(len(layout.anchors) * layout.block_size), in_whole_tiles(layout.num_context)

    def attend(query: Tensor, block: KeyValue, context: KeyValue, window: int, causal: bool = False) -> Tensor:
        num_rows, num_heads, head_dim = query.shape
        kv = block[0].shape[1]
        group = num_heads // kv
        grouped = in_tiles(query, rows).reshape(-1, TILE, kv, group, head_dim)
        context_k, context_v = (in_tiles(x, context_rows) for x in context)
        block_k, block_v = (in_tiles(x, rows) for x in block)
        # All but the number of tiles is known when it is compiled.
        for part in (grouped, context_k, context_v, block_k, block_v):
            torch._dynamo.mark_static(part, list(range(1, part.ndim)))
        mask = masks(window, causal, group if spread else 1)
        out: Tensor = kernel(grouped, context_k, context_v, block_k, block_v, mask, spread)
        # The backward of a slice writes zeros and then all of the gradient over them.
        return out if num_rows == rows else out[:num_rows]

    return attend


def _flex(
    query: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    block_k: Tensor,
    block_v: Tensor,
    mask: Any,
    spread: bool,
) -> Tensor:
    """query [tiles, TILE, K, G, D], keys and values [tiles, TILE, K, D] -> [N', Q, D].

    Split into tiles so that the compiler can tell that lengths are multiples of TILE: kernels then check no bounds.
    Heads are moved only in here: what a compiled function takes and gives is dense, so that no gradient is copied to
    be dense.
    """
    from torch.nn.attention import flex_attention as module

    keys, values = (
        torch.cat(pair).flatten(0, 1).transpose(0, 1).contiguous()[None]
        for pair in ((context_k, block_k), (context_v, block_v))
    )
    rows = query.flatten(0, 1)
    out: Tensor = module.flex_attention(
        rows.permute(2, 1, 0, 3) if spread else rows.flatten(1, 2).transpose(0, 1)[None],
        keys,
        values,
        block_mask=mask,
        enable_gqa=not spread,
        # Its kernel for short queries does not take this mask, and a batch of a few blocks is short.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    return (out.permute(2, 1, 0, 3) if spread else out.permute(2, 0, 1, 3)).flatten(1, 2)


def block_mask(layout: BlockLayout, window: int, device: torch.device, copies: int = 1, causal: bool = False) -> Any:
    """flex_attention's BlockMask of N' queries over T' + N' keys (context, then blocks), its tiles chosen on the host.

    copies: the size of its batch. Rows that only fill up see nothing of the context and no block.
    """
    rows, context = in_whole_tiles(len(layout.anchors) * layout.block_size), in_whole_tiles(layout.num_context)
    partial, full = tiles(layout, window, causal)

    def of_rows(values: Ints) -> Tensor:
        padded = np.pad(values.reshape(-1).astype(np.int32), (0, rows - values.size))
        return to_device(padded, device)

    own = context + np.arange(len(layout.anchors))[:, None] * layout.block_size
    first, last = of_rows(layout.visible_from(window)), of_rows(np.repeat(layout.anchors, layout.block_size))
    own_first, own_last = of_rows(np.repeat(own, layout.block_size)), of_rows(own + layout.seen_inside(causal))

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return ((key >= first[row]) & (key < last[row])) | ((key >= own_first[row]) & (key < own_last[row]))

    return tiled_mask(partial, full, visible, device, copies)


def tiles(layout: BlockLayout, window: int, causal: bool = False) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tiles a kernel must visit with the mask, and tiles it may take whole: bool [N' / TILE, (T' + N') / TILE] each."""
    b, context = layout.block_size, in_whole_tiles(layout.num_context)
    num_rows = len(layout.anchors) * b
    num_tiles = in_whole_tiles(num_rows) // TILE
    # Rows in units that never straddle a block nor a tile, so that one range of keys holds for each.
    unit = math.gcd(b, TILE)
    block, offset = np.divmod(np.arange(num_rows // unit) * unit, b)
    first = layout.visible_from(window)
    low_any, low_all, high = first[block, 0], first[block, -1], layout.anchors[block]
    own, seen = context + block * b, layout.seen_inside(causal)
    own_all, own_any = own + seen[offset], own + seen[offset + unit - 1]
    left = np.arange(context // TILE + num_tiles) * TILE
    right = left + TILE

    def overlap(low: Ints, high: Ints) -> NDArray[np.bool_]:
        return np.maximum(low[:, None], left) < np.minimum(high[:, None], right)

    def inside(low: Ints, high: Ints) -> NDArray[np.bool_]:
        return (low[:, None] <= left) & (high[:, None] >= right)

    def by_tile(units: NDArray[np.bool_], fill: bool) -> NDArray[np.bool_]:
        missing = num_tiles * (TILE // unit) - len(units)
        padded = np.pad(units, ((0, missing), (0, 0)), constant_values=fill)
        return padded.reshape(-1, TILE // unit, left.size)

    touched: NDArray[np.bool_] = np.logical_or.reduce(
        by_tile(overlap(low_any, high) | overlap(own, own_any), False), axis=1
    )
    whole = np.logical_and.reduce(by_tile(inside(low_all, high) | inside(own, own_all), True), axis=1)
    full: NDArray[np.bool_] = touched & whole
    return touched & ~full, full
