"""Rows that cannot be used: the error of one, and the count of a file's."""

from __future__ import annotations

import msgspec

from specd.errors import DataError


class RowError(DataError):
    """One row cannot be used. kind: the fault in a few words, the same for every row that has it ("unknown role")."""

    def __init__(self, where: str, kind: str, detail: str) -> None:
        super().__init__(f"{where}: {detail}")
        self.where, self.kind, self.detail = where, kind, detail

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str]]:
        """Another process is sent rows, and those that could not be read."""
        return RowError, (self.where, self.kind, self.detail)


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of fault. rows: how many have it. first: the message of the first one, which names it."""

    kind: str
    rows: int
    first: str


class Faults:
    """The faults of a file, counted in one pass."""

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
        """Add those of a later part of the file."""
        for fault in faults:
            self._rows[fault.kind] = self._rows.get(fault.kind, 0) + fault.rows
            self._first.setdefault(fault.kind, fault.first)

    def found(self) -> tuple[Fault, ...]:
        """Each kind, the most frequent one first."""
        kinds = sorted(self._rows, key=lambda kind: -self._rows[kind])
        return tuple(Fault(kind=kind, rows=self._rows[kind], first=self._first[kind]) for kind in kinds)

    def stop(self, path: str, rows: int) -> None:
        """Raise DataError if there is any fault. rows: how many were read."""
        if not self._rows:
            return
        found = self.found()
        each = "".join(f"\n  {fault.rows:,} × {fault.kind}, the first: {fault.first}" for fault in found)
        raise DataError(
            f"{path}: {len(self):,} of {rows:,} rows cannot be used:{each}\nmend them, or leave them out and counted "
            f"with data.bad_rows=skip"
        )
