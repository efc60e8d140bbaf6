"""Tokenised rows: which of the tokens are labels, in every way that trainers write it."""

from __future__ import annotations

from typing import Any

import pytest

from specd.data.faults import RowError
from specd.data.tokens import read_tokens

IDS = [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({}, [1, 1, 1, 1]),
        ({"loss_mask": [0, 1, 0, 1]}, [0, 1, 0, 1]),
        ({"loss_mask": [False, True, False, True]}, [0, 1, 0, 1]),
        ({"labels": [-100, -100, 7, 8]}, [0, 0, 1, 1]),
        ({"labels": IDS}, [1, 1, 1, 1]),
        ({"completion_mask": [0, 0, 1, 1]}, [0, 0, 1, 1]),
        ({"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 1, 0]}, [0, 1, 1, 0]),
        ({"labels": [-100, 6, 7, 8], "loss_mask": [1, 1, 1, 0]}, [0, 1, 1, 0]),
        ({"labels": None, "loss_mask": [0, 0, 0, 1]}, [0, 0, 0, 1]),
        ({"labels": [-100] * 4}, [0, 0, 0, 0]),
        ({"attention_mask": [1, 1, 1, 1]}, [1, 1, 1, 1]),
    ],
)
def test_labels(columns: dict[str, Any], labels: list[int]) -> None:
    read = read_tokens({"input_ids": IDS, **columns}, "row 1")
    assert read.ids.tolist() == IDS
    assert read.loss_mask.astype(int).tolist() == labels


def test_padding_is_left_out() -> None:
    padded = {"input_ids": [0, 5, 6, 0, 0], "attention_mask": [0, 1, 1, 0, 0]}
    for columns in (
        {"labels": [-100, -100, 6, -100, -100]},
        {"loss_mask": [0, 0, 1, 1, 1]},
        {"labels": [9, -100, 6, 9, 9]},
    ):
        read = read_tokens(padded | columns, "row 1")
        assert (read.ids.tolist(), read.loss_mask.tolist()) == ([5, 6], [False, True])


def test_a_row_without_tokens_is_empty() -> None:
    read = read_tokens({"input_ids": [], "labels": []}, "row 1")
    assert read.ids.size == read.loss_mask.size == 0


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        ({"input_ids": None}, "no token ids", "`input_ids` is None; expected a list of integers from 0 to 2147483647"),
        ({"input_ids": "5 6"}, "no token ids", "`input_ids` is '5 6'"),
        ({"input_ids": [5, -1]}, "no token ids", r"`input_ids` is \[5, -1\]"),
        ({"input_ids": [5.0]}, "no token ids", r"`input_ids` is \[5.0\]"),
        ({"input_ids": [[5, 6]]}, "no token ids", r"`input_ids` is \[\[5, 6\]\]"),
        ({"input_ids": [[5], [6, 7]]}, "no token ids", r"`input_ids` is"),
        ({"input_ids": [2**70]}, "no token ids", r"`input_ids` is"),
        ({"input_ids": [5], "loss_mask": [2]}, "no token ids", r"`loss_mask` is \[2\]; expected .* from 0 to 1"),
        ({"input_ids": [5], "labels": [-1]}, "labels that are other tokens", "holds -1 at place 0"),
        ({"input_ids": [5], "labels": [-101]}, "no token ids", "`labels` is .* from -100 to"),
        (
            {"input_ids": IDS, "labels": [6, 7, 8, -100]},
            "labels that are other tokens",
            "holds 6 at place 0, .* holds 5",
        ),
        ({"input_ids": IDS, "labels": [5]}, "no label for each token", "4 `input_ids` but 1 in `labels`"),
        (
            {"input_ids": IDS, "attention_mask": [1]},
            "no label for each token",
            "4 `input_ids` but 1 in `attention_mask`",
        ),
    ],
)
def test_malformed_tokens_are_named(row: dict[str, Any], kind: str, said: str) -> None:
    with pytest.raises(RowError, match=f"^a.jsonl line 7: .*{said}") as caught:
        read_tokens(row, "a.jsonl line 7")
    assert caught.value.kind == kind
