"""Rows as training reads them, a few of a file, to look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from specd.data.faults import RowError
from specd.data.rows import read_rows, sources
from specd.data.samples import Coded, Maker
from specd.errors import DataError


class Seen(NamedTuple):
    """One row. number: of it, from 1; several files are counted through. where: its place in them."""

    number: int
    where: str
    coded: Coded | RowError


def look(maker: Maker, wanted: Sequence[range]) -> Iterator[Seen]:
    """The rows of the maker's data whose numbers are in `wanted`, in order: uncut, with labels or without.

    Raises DataError when there are fewer rows than one of `wanted` begins with, and what `prepare` raises at once.
    """
    config = maker.job.config
    last = max(numbers.stop for numbers in wanted) - 1
    rows = chain.from_iterable(read_rows(source) for source in sources(config))
    number = 0
    for number, row in enumerate(islice(rows, config.max_samples or None), start=1):
        if any(number in numbers for numbers in wanted):
            yield from (Seen(number, row[0], coded) for coded in maker.coded([row]))
        if number >= last:
            break
    if missing := [numbers.start for numbers in wanted if numbers.start > number]:
        names = ", ".join(map(str, sources(config)))
        raise DataError(f"{names} has {number} rows, and no row {missing[0]}; rows count from 1")
