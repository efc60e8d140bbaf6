"""Samples that another trainer has prepared: rows with input_ids and loss_mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from specd.errors import DataError


class Table(Protocol):
    """Rows by number: a list, a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Mapping[str, Any]: ...


class Rows:
    """Samples for a BatchPlan and a Loader; each row is read when it is needed. Labels are what loss_mask marks."""

    __slots__ = ("_max_length", "_table", "lengths")

    def __init__(self, table: Table, max_length: int, *, lengths: Sequence[int] | None = None) -> None:
        """max_length: tokens at which samples are cut. lengths: of each row, if known, or all are read once.

        Raises DataError for a row without tokens, or with other than one mark for each token.
        """
        self._table, self._max_length = table, max_length
        if lengths is None:
            lengths = [self._read(i)[0].size for i in range(len(table))]
        if len(lengths) != len(table):
            raise DataError(f"{len(lengths)} lengths of {len(table)} rows; expected one for each")
        self.lengths: NDArray[np.int64] = np.minimum(np.asarray(lengths, np.int64), max_length)

    def __len__(self) -> int:
        return len(self._table)

    def tokens(self, i: int) -> NDArray[np.int32]:
        return self._cut(i, 0).astype(np.int32)

    def loss_mask(self, i: int) -> NDArray[np.bool_]:
        return self._cut(i, 1).astype(np.bool_)

    def _cut(self, i: int, part: int) -> NDArray[Any]:
        column = self._read(i)[part][: self._max_length]
        if column.size != self.lengths[i]:
            raise DataError(f"row {i} has {column.size} tokens where its length was said to be {self.lengths[i]}")
        return column

    def _read(self, i: int) -> tuple[NDArray[Any], NDArray[Any]]:
        row = self._table[i]
        ids, mask = (np.asarray(row[name]).reshape(-1) for name in ("input_ids", "loss_mask"))
        if not ids.size or ids.size != mask.size:
            raise DataError(
                f"row {i} has {ids.size} input_ids and a loss_mask of {mask.size}; expected one each a token"
            )
        return ids, mask
