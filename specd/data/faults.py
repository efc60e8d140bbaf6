"""Rows that cannot be used: the error of one, and the count of a file's."""

from __future__ import annotations

from typing import Any

import msgspec

from specd.errors import DataError

TOO_DEEP = "holds lists and objects within each other more deeply than can be read; expected a conversation or a text"


class RowError(DataError):
    """One row cannot be used. where: its place ("train.jsonl line 3"). detail: what is wrong with it.

    kind: the fault in a few words, the same for every row that has it ("unknown role").
    """

    def __init__(self, where: str, kind: str, detail: str) -> None:
        super().__init__(where, kind, detail)  # all of them, so that one can be sent to another process
        self.where, self.kind, self.detail = where, kind, detail

    def __str__(self) -> str:
        return f"{self.where}: {self.detail}"


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of fault. rows: how many have it. first: the message of the first one, which names it."""

    kind: str
    rows: int
    first: str

    def __str__(self) -> str:
        return f"{self.rows:,} × {self.kind}, the first: {self.first}"


class Faults:
    """The faults of a data set, counted in one pass."""

    __slots__ = ("_first", "_rows")

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._first: dict[str, str] = {}

    def __len__(self) -> int:
        """How many rows cannot be used."""
        return sum(self._rows.values())

    def add(self, error: RowError) -> None:
        self._rows[error.kind] = self._rows.get(error.kind, 0) + 1
        self._first.setdefault(error.kind, str(error))

    def merge(self, faults: tuple[Fault, ...]) -> None:
        """Add those of a later part of the data, as another process found them."""
        for fault in faults:
            self._rows[fault.kind] = self._rows.get(fault.kind, 0) + fault.rows
            self._first.setdefault(fault.kind, fault.first)

    def found(self) -> tuple[Fault, ...]:
        """Each kind, the most frequent one first."""
        kinds = sorted(self._rows, key=lambda kind: -self._rows[kind])
        return tuple(Fault(kind=kind, rows=self._rows[kind], first=self._first[kind]) for kind in kinds)

    def stop(self, path: object, rows: int) -> None:
        """Raise DataError if there is any fault. path: of the data, for the message. rows: how many were read."""
        if not self._rows:
            return
        each = "".join(f"\n  {fault}" for fault in self.found())
        raise DataError(
            f"{path}: {len(self):,} of {rows:,} rows cannot be used:{each}\n"
            f"mend them, or leave them out with data.bad_rows=skip, which counts them"
        )


def short(value: Any) -> str:
    """A value for a message."""
    found = repr(value)
    return found if len(found) <= 60 else found[:57] + "…"
