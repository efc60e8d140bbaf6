"""Faults are counted by kind, over parts and processes, and said in one message."""

from __future__ import annotations

import pickle

import pytest

from specd.data.faults import Fault, Faults, RowError, short
from specd.errors import DataError


def test_faults_are_counted_by_kind_with_the_first_of_each() -> None:
    faults = Faults()
    faults.stop("a.jsonl", 10)
    assert (len(faults), faults.found()) == (0, ())
    for line, kind in enumerate(["no turns", "unknown role", "unknown role", "no turns", "unknown role"], start=1):
        faults.add(RowError(f"a.jsonl line {line}", kind, f"{kind} here"))
    assert len(faults) == 5
    assert faults.found() == (
        Fault(kind="unknown role", rows=3, first="a.jsonl line 2: unknown role here"),
        Fault(kind="no turns", rows=2, first="a.jsonl line 1: no turns here"),
    )
    faults.merge((Fault(kind="no turns", rows=1995, first="later"), Fault(kind="no JSON", rows=1, first="a.jsonl x")))
    assert len(faults) == 2001
    with pytest.raises(DataError) as caught:
        faults.stop("a.jsonl", 12_000)
    assert str(caught.value).splitlines() == [
        "a.jsonl: 2,001 of 12,000 rows cannot be used:",
        "  1,997 × no turns, the first: a.jsonl line 1: no turns here",
        "  3 × unknown role, the first: a.jsonl line 2: unknown role here",
        "  1 × no JSON, the first: a.jsonl x",
        "mend them, or leave them out with data.bad_rows=skip, which counts them",
    ]


def test_the_error_of_a_row_can_be_sent_to_another_process() -> None:
    error = RowError("a.jsonl line 3", "unknown role", "turn 1 has role 'robot'")
    sent = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (sent.where, sent.kind, sent.detail) == ("a.jsonl line 3", "unknown role", "turn 1 has role 'robot'")
    assert str(sent) == str(error) == "a.jsonl line 3: turn 1 has role 'robot'"


def test_a_value_in_a_message_is_short() -> None:
    assert short({"a": 1}) == "{'a': 1}"
    assert len(short("x" * 1000)) == 58
