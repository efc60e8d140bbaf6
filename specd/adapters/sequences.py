"""Sequences that lie end to end, laid out as other trainers want them.

Shape legend: T tokens of a batch, B sequences, L the longest one, H the width of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from specd.errors import ConfigError
from specd.protocol.batch import Delivery


def tokens_of(delivery: Delivery, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels (0 or 1) and lengths, int64 [T], [T] and [B]."""
    batch = delivery.batch
    columns = (batch.tokens, batch.loss_mask, batch.lengths)
    ids, labels, lengths = (torch.from_numpy(column).long().to(device) for column in columns)
    return ids, labels, lengths


def taps_of(delivery: Delivery) -> Tensor:
    """Taps side by side, [T, N·H]. Raises ConfigError where none were captured."""
    if delivery.taps is None:
        raise ConfigError("the subscriber captures no taps; give it the spec that this adapter's capture() returns")
    return delivery.taps.flatten(1)


def final_of(delivery: Delivery) -> Tensor:
    """The normed last states, [T, H]. Raises ConfigError where they were not captured."""
    if delivery.final is None:
        raise ConfigError(
            "the subscriber does not capture final; give it the spec that this adapter's capture() returns"
        )
    return delivery.final


def numbers(lengths: Tensor) -> Tensor:
    """Which sequence each token is in, [T]."""
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def positions(lengths: Tensor) -> Tensor:
    """Where in its sequence each token is, from 0, [T]."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) - starts[numbers(lengths)]


def side_by_side(column: Tensor, lengths: Tensor) -> Tensor:
    """[T, …] as [B, L, …], zeros behind shorter sequences."""
    rows = column.new_zeros((lengths.numel(), int(lengths.max()), *column.shape[1:]))
    rows[numbers(lengths), positions(lengths)] = column
    return rows


def ascending(layer_ids: Sequence[int], least: int, what: str) -> None:
    """Raise ConfigError for ids of layers that cannot be taps, in this order."""
    if not layer_ids or min(layer_ids) < least or any(a >= b for a, b in pairwise(layer_ids)):
        raise ConfigError(f"layer ids {list(layer_ids)}: expected ascending ones from {least} on; {what}")
