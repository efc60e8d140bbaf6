"""What the engines' own draft classes need to run here: attention without kernels, one rank without a server."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from drafts import make_batch
from eagle import chain, deliver
from specd.drafts.eagle3.objective import Eagle3

STEPS = 4
LENGTH = 14


class CachedAttention(nn.Module):
    """Attention of rows over all rows so far, causal. Queries, keys and values are [rows, heads · D]."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.sizes = (num_heads, num_kv_heads, head_dim)
        self.keys = self.values = torch.empty(0, num_kv_heads, head_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        num_heads, num_kv_heads, head_dim = self.sizes
        self.keys = torch.cat((self.keys, key.view(-1, num_kv_heads, head_dim)))
        self.values = torch.cat((self.values, value.view(-1, num_kv_heads, head_dim)))
        rows, known = query.shape[0], self.keys.shape[0]
        visible = torch.ones(rows, known, dtype=torch.bool).tril(known - rows)
        found = nn.functional.scaled_dot_product_attention(
            query.view(rows, num_heads, head_dim).transpose(0, 1),
            self.keys.transpose(0, 1),
            self.values.transpose(0, 1),
            attn_mask=visible,
            enable_gqa=True,
        )
        return found.transpose(0, 1).flatten(1)


class Off:
    """Settings that nobody made: whatever is asked for is not there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Off()

    def __bool__(self) -> bool:
        return False


class OneRank:
    """Of a group of one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return 1 if name.endswith("size") else 0 if name.endswith("rank") else None


def differences(objective: Eagle3, enter: Any, step: Any, head: Tensor) -> list[float]:
    """How far an engine's draft is from EAGLE-3's definition, at its first step and at the cached ones after it.

    enter: taps -> states. step: token ids, positions and states -> what lm_head reads and the next states, of a row
    each. Relative to the largest value, of states and of `head`'s logits.
    """
    batch = make_batch((LENGTH,))
    delivery = deliver(batch)
    assert delivery.taps is not None
    taps, tokens, row = delivery.taps.flatten(1), torch.from_numpy(batch.tokens).long(), LENGTH - STEPS - 1
    expected = chain(objective.draft, objective.embedding, tokens.tolist(), taps, row, STEPS)
    states, ids, positions = enter(taps[: row + 1]), tokens[1 : row + 2], torch.arange(row + 1)
    found = []
    for number, wanted in enumerate(expected):
        read, states = step(ids, positions, states)
        for one, other in ((read[-1], wanted), (head @ read[-1], objective.draft.lm_head.weight @ wanted)):
            found.append(float((one - other).abs().max() / other.abs().max()))
        states, positions = states[-1:], torch.tensor([row + 1 + number])
        ids = tokens[row + 2 + number : row + 3 + number]
    return found
