"""Rows that are tokenised already: ids and which of them are labels, in the ways that trainers write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.data.faults import RowError, short

IGNORED = -100
"""What stands in `labels` where a token is no label."""
MASKS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")
"""Columns that hold 1 for a token that is a label, else 0; of several, all must say 1."""


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids [N] int64 and their labels [N] bool, not yet held against a vocabulary."""

    ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]


def read_tokens(row: Mapping[str, Any], where: str) -> Tokens:
    """The ids of `row`, padding (attention_mask 0) left out. Without a column that says otherwise, all are labels.

    Raises RowError for what is no list of integers, of another length, or labels that are other tokens.
    """
    ids = _integers(row, "input_ids", where, 0, 2**31 - 1)
    mask = np.ones(ids.size, np.bool_)
    for column in MASKS:
        if row.get(column) is not None:
            mask &= _beside(row, column, where, ids.size, 0, 1).astype(np.bool_)
    shown = np.ones(ids.size, np.bool_)
    if row.get("attention_mask") is not None:
        shown = _beside(row, "attention_mask", where, ids.size, 0, 1).astype(np.bool_)
    if row.get("labels") is not None:
        labels = _beside(row, "labels", where, ids.size, IGNORED, 2**31 - 1)
        other = shown & (labels != IGNORED) & (labels != ids)
        if other.any():
            place = int(other.argmax())
            detail = (
                f"`labels` holds {labels[place]} at place {place}, where `input_ids` holds {ids[place]}; expected the "
                f"same token or {IGNORED}, not shifted"
            )
            raise RowError(where, "labels that are other tokens", detail)
        mask &= labels != IGNORED
    return Tokens(ids=ids[shown], loss_mask=mask[shown])


def _beside(row: Mapping[str, Any], column: str, where: str, size: int, least: int, top: int) -> NDArray[np.int64]:
    """The integers of a column that has one for each token."""
    array = _integers(row, column, where, least, top)
    if array.size != size:
        detail = f"{size} `input_ids` but {array.size} in `{column}`; expected one for each token"
        raise RowError(where, "no label for each token", detail)
    return array


def _integers(row: Mapping[str, Any], column: str, where: str, least: int, top: int) -> NDArray[np.int64]:
    value = row.get(column)
    try:
        array = np.array(value)
    except (ValueError, OverflowError):  # nested lists of unequal length, integers beyond 64 bits
        array = np.array(None)
    if array.ndim == 1 and array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iub" or not least <= array.min() <= array.max() <= top:
        detail = f"`{column}` is {short(value)}; expected a list of integers from {least} to {top}"
        raise RowError(where, "no token ids", detail)
    return array.astype(np.int64)
