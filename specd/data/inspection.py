"""Rows as training reads them, a few of a file, to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.config.settings import DataConfig
from specd.data import dataset
from specd.data.faults import RowError
from specd.errors import DataError


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One row. where: its place. tokens int32 and loss_mask bool, [N]: uncut, with labels or without.

    dropped: answers of which the chat template leaves something out. document: it never went through a template.
    """

    where: str
    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    dropped: int = 0
    document: bool = False


def look(config: DataConfig, tokenizer_dir: Path, wanted: Sequence[range]) -> Iterator[tuple[int, Seen | RowError]]:
    """Those of the rows of `config.path` that `wanted` holds, in order, with their numbers from 1.

    A row that cannot be used comes as its error. Raises DataError when there are fewer rows than `wanted` begins
    with, and what `prepare` raises at once.
    """
    last = max(numbers.stop for numbers in wanted) - 1
    number = 0
    for number, (where, row) in enumerate(dataset._rows(config), start=1):
        if any(number in numbers for numbers in wanted):
            try:
                for _, tokens, mask in dataset._samples(config, tokenizer_dir, iter([(where, row)])):
                    yield number, Seen(where=where, tokens=tokens, loss_mask=mask)
            except RowError as error:
                yield number, error
        if number >= last:
            break
    if missing := [numbers.start for numbers in wanted if numbers.start > number]:
        raise DataError(f"{config.path} has {number} rows, and no row {missing[0]}; rows count from 1")
