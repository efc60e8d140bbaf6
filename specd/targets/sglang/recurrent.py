"""Recurrent states of SGLang's hybrid models: one slot of its pool for each sequence of a forward, cleared before it.

SGLang's scheduler hands these slots out, which specd bypasses: unassigned, all sequences of a forward share slot 0, and
each forward begins with what the last one left there.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Final

import torch

from specd.errors import TargetError
from specd.targets.sglang.versions import SGLang, cap_states, state_bytes

log = logging.getLogger(__name__)

SHARE: Final = 32
"""The states of a forward may take one part in so many of the device's memory: 4.4 GiB of an H200."""

LEAST: Final = 2
"""Sequences a forward takes in any case: a start checks that two are kept apart."""


def plan(sg: SGLang, runner: Any, device: torch.device, most: int) -> None:
    """Let the pool of a hybrid model hold as many states as memory allows, up to `most`; before it is allocated."""
    each = state_bytes(sg, runner)
    if not each:
        return
    count = max(LEAST, min(most, _memory(device) // SHARE // each))
    log.info(
        "recurrent states take %.1f MiB a sequence, room for %d: %.2f GiB", each / 2**20, count, each * count / 2**30
    )
    cap_states(sg, runner, count)


class States:
    """The pool of a runner: row r of its request table has slot r. Empty for models without recurrent layers."""

    __slots__ = ("_pool", "_rows")

    def __init__(self, runner: Any, rows: torch.Tensor) -> None:
        """rows: int64, those of the request table that forwards use, from 1 on; slot 0 is SGLang's padding."""
        table = runner.req_to_token_pool
        self._pool: Any = getattr(table, "mamba_pool", None)
        self._rows = rows
        if self._pool is not None:
            slots = table.req_index_to_mamba_index_mapping
            slots[rows] = rows.to(slots.dtype)
            self._pool.clear_slots(torch.cat([rows.new_zeros(1), rows]))  # recording graphs writes to slot 0

    def __bool__(self) -> bool:
        return self._pool is not None

    def clear(self, count: int) -> None:
        """Let the first `count` rows begin anew."""
        if self._pool is not None:
            self._pool.clear_slots(self._rows[:count])

    def check(self, count: int, name: str) -> None:
        """Refuse a model that has kept the states of the last forward's `count` sequences elsewhere than it should."""
        if self._pool is None:
            return
        cache = self._pool.mamba_cache
        written: set[int] = set()
        for layer in (layer for part in (*cache.conv, cache.temporal) if part.numel() for layer in part):
            written |= set(layer.flatten(1).any(dim=1).nonzero().flatten().tolist())
        if written - {0} != set(range(1, count + 1)):  # what graphs are recorded with writes the padding's
            raise TargetError(
                f"SGLang's {name} left the recurrent states of {count} sequences in slots {sorted(written)}, expected "
                f"slots 1…{count}: it does not keep them apart; use --backend transformers"
            )


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
