"""Counts of portions add up to those of the whole, with the first fault of each kind."""

from __future__ import annotations

import numpy as np

from specd.data.faults import Fault
from specd.data.portion import Portion, Report


def test_samples_lie_end_to_end() -> None:
    parts = [(1, np.array([5, 6], np.int32), np.array([False, True])), (3, np.array([7], np.int32), np.array([True]))]
    portion = Portion.of(parts, rows=4, without_labels=2)
    assert portion.tokens.tolist() == [5, 6, 7]
    assert portion.loss_mask.tolist() == [False, True, True]
    assert (portion.lengths.tolist(), portion.rows.tolist()) == ([2, 1], [1, 3])
    assert portion.report == Report(rows=4, samples=2, tokens=3, trainable_tokens=2, without_labels=2)


def test_no_samples_are_empty_arrays_of_the_same_kinds() -> None:
    portion = Portion.of([], rows=1)
    assert [array.dtype.name for array in portion[:4]] == ["int32", "bool", "int64", "int64"]
    assert [array.size for array in portion[:4]] == [0, 0, 0, 0]


def test_reports_add_up() -> None:
    role = Fault(kind="unknown role", rows=2, first="line 1: …")
    first = Report(rows=5, samples=3, tokens=30, bad=(role,), forms={"chat": 3})
    second = Report(rows=4, samples=2, split=1, tokens=20, cut=1, dropped=2, forms={"chat": 1, "code": 1})
    third = Report(
        rows=9,
        samples=4,
        without_labels=1,
        bad=(
            Fault(kind="no turns", rows=3, first="line 12: …"),
            Fault(kind="unknown role", rows=1, first="line 15: …"),
        ),
    )
    whole = Report().plus(first, 0).plus(second, 0).plus(third, 2)
    assert (whole.rows, whole.samples, whole.tokens, whole.cut, whole.dropped) == (18, 9, 50, 1, 2)
    assert whole.bad == (
        Fault(kind="unknown role", rows=3, first="line 1: …"),
        Fault(kind="no turns", rows=3, first="line 12: …"),
    )
    assert whole.forms == {"chat": 4, "code": 1}
    assert whole.sources == (5, 0, 4)
    assert whole.num_bad == 6
