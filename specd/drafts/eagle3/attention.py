"""Attention of one step: the first step's keys of the row's own sequence up to it, and one key of each later step.

Two implementations: plain torch ops sequence by sequence, and flex_attention over the keys of the first step, whose
result is merged with the few later ones by its log-sum-exp.
Shape legend: T tokens of a batch, R rows, Q query heads, K key-value heads, G = Q / K, D head size. For
flex_attention's kernels T and R are whole tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from specd.drafts.compile import compiled
from specd.drafts.device import Ints, to_device
from specd.drafts.flex import INSTEAD, TILE, Bools, in_tiles, tiled_mask
from specd.drafts.layers import KeyValue


class Attend(Protocol):
    """Attention of the rows of one batch."""

    def __call__(self, query: Tensor, rows: Ints, context: KeyValue, later: Sequence[KeyValue]) -> Tensor:
        """query [R, Q, D] of the ascending `rows` -> [R, Q, D].

        context: keys and values of the first step, of all T rows. later: those of each later step, of `rows` alone.
        """
        ...


def attention(flex: bool, rows: Ints, starts: Ints, device: torch.device) -> Attend:
    """That of a batch. starts: first row of the sequence of each row, [T]. rows: of every step, for flex_attention."""
    return flex_attention(rows, starts, device) if flex else plain_attention(starts)


def plain_attention(starts: Ints) -> Attend:
    """In plain torch ops, one sequence after the other."""

    def attend(query: Tensor, rows: Ints, context: KeyValue, later: Sequence[KeyValue]) -> Tensor:
        if not rows.size:  # none, with a graph to every key and value
            return query + 0 * (context[0].sum() + context[1].sum())
        begins = np.flatnonzero(np.diff(starts[rows], prepend=-1)).tolist()
        parts = []
        for begin, end in zip(begins, [*begins[1:], rows.size], strict=True):
            own, first = slice(begin, end), int(starts[rows[begin]])
            seen = slice(first, int(rows[end - 1]) + 1)
            visible = torch.from_numpy(rows[own, None] >= np.arange(seen.start, seen.stop)).to(query.device)
            keys, values = (part[seen] for part in context)
            parts.append(_one(query[own], keys, values, visible, [(k[own], v[own]) for k, v in later]))
        return torch.cat(parts)

    return attend


def _one(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, later: Sequence[KeyValue]) -> Tensor:
    """One sequence: query [R, Q, D], keys and values [S, K, D], visible bool [R, S]."""
    rows, heads, size = query.shape
    grouped = query.reshape(rows, keys.shape[1], -1, size) * size**-0.5
    scores = torch.einsum("rkgd,skd->kgrs", grouped, keys).masked_fill(~visible, -torch.inf)
    own = [torch.einsum("rkgd,rkd->kgr", grouped, key)[..., None] for key, _ in later]
    shares = torch.cat((scores, *own), -1).softmax(-1, dtype=torch.float32).to(values.dtype)
    found = torch.einsum("kgrs,skd->rkgd", shares[..., : keys.shape[0]], values)
    for step, (_, value) in enumerate(later, start=keys.shape[0]):
        found = found + shares[..., step].permute(2, 0, 1)[..., None] * value[:, :, None]
    return found.reshape(rows, heads, size)


def flex_attention(rows: Ints, starts: Ints, device: torch.device) -> Attend:
    """By torch's flex_attention: compiled on CUDA; elsewhere interpreted, and torch has no gradients of it there.

    rows: those of every step, in whole tiles, and `starts` of whole tiles of tokens, as of `rows.in_tiles`.
    """
    masks, num_rows = functools.cache(lambda copies: sequence_mask(rows, starts, device, copies)), rows.size
    kernel, together = _flex, merge
    if device.type == "cuda":
        kernel, together = compiled(_flex, INSTEAD), compiled(merge, INSTEAD)

    def attend(query: Tensor, rows: Ints, context: KeyValue, later: Sequence[KeyValue]) -> Tensor:
        assert rows.size == num_rows, "the same rows at every step"
        kv, size = context[0].shape[1:]
        grouped = in_tiles(query, num_rows).reshape(-1, TILE, kv, query.shape[1] // kv, size)
        keys, values = (in_tiles(part, part.shape[0]) for part in context)
        _known_but_rows(grouped, keys, values)
        found: Tensor
        found, lse = kernel(grouped, keys, values, masks(grouped.shape[3]))
        if not later:
            return found
        flat = [part for pair in later for part in pair]
        _known_but_rows(query, found, lse, *flat)
        merged: Tensor = together(query, found, lse, flat[::2], flat[1::2])
        return merged

    return attend


def _known_but_rows(*parts: Tensor) -> None:
    """All but the number of rows is known when a kernel is compiled."""
    for part in parts:
        torch._dynamo.mark_static(part, list(range(1, part.ndim)))


def _flex(query: Tensor, keys: Tensor, values: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
    """query [tiles, TILE, K, G, D], keys and values [tiles, TILE, K, D] -> [R, Q, D], log-sum-exp [R, Q] float32.

    Split into tiles so that the compiler can tell that lengths are multiples of TILE. Query heads that share keys go as
    a batch over one set of keys, as in `block_attention.flex_attention`.
    """
    from torch.nn.attention import flex_attention as module

    k, v = (part.flatten(0, 1).transpose(0, 1).contiguous()[None] for part in (keys, values))
    found, aux = module.flex_attention(
        query.flatten(0, 1).permute(2, 1, 0, 3),
        k,
        v,
        block_mask=mask,
        return_aux=module.AuxRequest(lse=True),
        # Its kernel for short queries does not take this mask, and a batch of a few rows is short.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    assert aux.lse is not None, "asked for"
    return found.permute(2, 1, 0, 3).flatten(1, 2), aux.lse.permute(2, 1, 0).flatten(1, 2)


def merge(query: Tensor, found: Tensor, lse: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Attention over some keys, and what each row sees besides them -> attention over all of them, [R, Q, D].

    query, found [R, Q, D]; lse [R, Q] float32, the log-sum-exp of the scores behind `found`. keys, values: one more of
    each row, [R, K, D] each. Computed in float32.
    """
    rows, heads, size = query.shape
    kv = keys[0].shape[1]
    grouped = query.float().reshape(rows, kv, heads // kv, size) * size**-0.5
    scores = [(grouped * key.float()[:, :, None]).sum(-1) for key in keys]
    seen = lse.reshape(rows, kv, heads // kv)
    total = torch.stack((seen, *scores)).logsumexp(0)
    # Summed in the shape that is returned: a view of another would be compiled for apart by whoever takes it.
    out: Tensor = found.float() * (seen - total).exp().flatten(1)[..., None]
    for score, value in zip(scores, values, strict=True):
        out = out + ((score - total).exp()[..., None] * value.float()[:, :, None]).flatten(1, 2)
    return out.to(query.dtype)


def sequence_mask(rows: Ints, starts: Ints, device: torch.device, copies: int = 1) -> Any:
    """flex_attention's BlockMask of `rows` over all tokens: each sees its own sequence up to itself.

    copies: the size of its batch.
    """
    partial, full = tiles(rows, starts)
    first, last = (to_device(part.astype(np.int32), device) for part in (starts[rows], rows))

    def visible(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= first[row]) & (key <= last[row])

    return tiled_mask(partial, full, visible, device, copies)


def tiles(rows: Ints, starts: Ints) -> tuple[Bools, Bools]:
    """Tiles a kernel must visit with the mask, and tiles it may take whole: bool [R / TILE, T / TILE] each.

    Between the first and the last key of a tile of rows all are visited, whether or not a sequence without rows is
    among them.
    """
    first, last = (part.reshape(-1, TILE)[:, :, None] for part in (starts[rows], rows + 1))
    left = np.arange(0, starts.size, TILE)
    touched = (first.min(1) < left + TILE) & (last.max(1) > left)
    full = (first.max(1) <= left) & (last.min(1) >= left + TILE)
    return touched & ~full, full
