"""Rows of other trainers as samples."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch

from specd.adapters.rows import Rows
from specd.errors import DataError

TABLE: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]},
    {"input_ids": torch.tensor([[1, 2, 3, 4]]), "loss_mask": torch.tensor([[0, 0, 1, 1]])},  # as SpecForge keeps them
]


def test_rows_are_cut_where_samples_end() -> None:
    for lengths in (None, [3, 4]):
        rows = Rows(TABLE, 3, lengths=lengths)
        assert rows.lengths.tolist() == [3, 3]
        assert [rows.tokens(i).tolist() for i in range(len(rows))] == [[5, 6, 7], [1, 2, 3]]
        assert [rows.loss_mask(i).tolist() for i in range(2)] == [[False, True, True], [False, False, True]]


def test_rows_of_a_data_set_as_speculators_keeps_them() -> None:
    rows = [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1], "seq_len": 3}]
    data = datasets.Dataset.from_list([*rows, {"input_ids": [1, 2], "loss_mask": [0, 1], "seq_len": 2}])
    data.set_format("torch", columns=["input_ids", "loss_mask"], output_all_columns=True)
    samples = Rows(data, 8, lengths=data["seq_len"])
    assert samples.lengths.tolist() == [3, 2]
    assert (samples.tokens(1).tolist(), samples.loss_mask(0).tolist()) == ([1, 2], [False, True, True])


def test_rows_that_cannot_be_used_are_named() -> None:
    with pytest.raises(DataError, match="row 1 has 2 input_ids and a loss_mask of 3"):
        Rows([TABLE[0], {"input_ids": [1, 2], "loss_mask": [1, 1, 1]}], 8)
    with pytest.raises(DataError, match="row 0 has 0 input_ids"):
        Rows([{"input_ids": [], "loss_mask": []}], 8)
    with pytest.raises(DataError, match="1 lengths of 2 rows"):
        Rows(TABLE, 8, lengths=[3])
    with pytest.raises(DataError, match="row 0 has 3 tokens where its length was said to be 2"):
        Rows(TABLE, 8, lengths=[2, 4]).tokens(0)
