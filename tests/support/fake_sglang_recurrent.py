"""A hybrid model of the fake SGLang: layers that carry a state from token to token, and the pool that keeps it."""

from __future__ import annotations

import types
from typing import Any

import torch

STATE_BYTES = 1 << 20
"""What a sequence's states take, as the fake says."""


class Pool:
    """SGLang's MambaPool: [layers, slots, size] of states, which its owner assigns and clears."""

    def __init__(self, layers: int, slots: int, size: int) -> None:
        temporal = torch.zeros(layers, slots + 1, size)
        self.mamba_cache = types.SimpleNamespace(conv=[torch.zeros(layers, slots + 1, 2, 3)], temporal=temporal)
        self.cleared: list[list[int]] = []

    def clear_slots(self, slots: torch.Tensor) -> None:
        self.cleared.append(slots.tolist())
        self.mamba_cache.temporal[:, slots] = 0


class Memory:
    """A layer's running sum: begins with what its slot holds, and leaves its end there."""

    def __init__(self, table: Any, layer: int) -> None:
        self.table, self.layer = table, layer

    def summed(self, row: int, seen: torch.Tensor) -> torch.Tensor:
        slot = int(self.table.req_index_to_mamba_index_mapping[row])
        states = self.table.mamba_pool.mamba_cache.temporal[self.layer]
        sums: torch.Tensor = seen.cumsum(0) + states[slot]
        states[slot] = sums[-1]
        return sums
