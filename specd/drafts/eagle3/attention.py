"""Attention of one step: the first step's keys of the row's own sequence up to it, and one key of each later step.

Shape legend: T tokens of a batch, R rows, Q query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from specd.drafts.eagle3.rows import Ints
from specd.drafts.layers import KeyValue


def attend(query: Tensor, rows: Ints, starts: Ints, context: KeyValue, later: Sequence[KeyValue]) -> Tensor:
    """query [R, Q, D] of the ascending `rows` -> [R, Q, D].

    starts: first row of the sequence of each row, [T]. context: keys and values of the first step, of all T rows.
    later: those of each later step, of `rows` alone.
    """
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
