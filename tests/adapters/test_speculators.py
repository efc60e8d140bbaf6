"""Batches for Speculators: what lies where. tests/oracles/test_adapters.py compares them with its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from drafts import deliver
from samples import batch
from specd.adapters.speculators import Form, capture, take_normed
from specd.errors import ConfigError
from specd.protocol.batch import Delivery


def numbered(lengths: tuple[int, ...] = (3, 1, 2)) -> Delivery:
    """Token t has the state t."""
    made = batch(0, lengths)
    made.tokens[:] = np.arange(made.num_tokens)
    states = torch.arange(made.num_tokens).float()
    return Delivery(made, states[:, None, None].repeat(1, 2, 4), states[:, None].repeat(1, 4))


def test_a_row_reads_its_own_states() -> None:
    item = Form("dflash", 8)(numbered())
    assert item["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0]]
    assert item["hidden_states"][0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
    assert item["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 0]]
    assert item["document_ids"].tolist() == [[0, 0, 0, 1, 2, 2, -1, -1]]
    assert item["hidden_states"].shape == (1, 8, 8)


def test_an_eagles_row_reads_the_state_before() -> None:
    item = Form("eagle3", 8)(numbered())
    assert item["input_ids"].tolist() == [[1, 2, 5, 0, 0, 0, 0, 0]]
    assert item["hidden_states"][0, :3, 0].tolist() == [0, 1, 4]
    assert item["verifier_last_hidden_states"][0, :3, 0].tolist() == [1, 2, 5]
    assert item["position_ids"].tolist() == [[1, 2, 1, 0, 0, 0, 0, 0]]
    assert item["document_ids"].tolist() == [[0, 0, 2, -1, -1, -1, -1, -1]]


def test_layers_are_counted_from_the_embedding() -> None:
    spec = capture([2, 18, 33])
    assert (spec.taps, spec.final, spec.dtype) == ((1, 17, 32), True, "bfloat16")
    for wrong in ([0, 3], [3, 2], []):
        with pytest.raises(ConfigError, match="expected ascending ones from 1 on"):
            capture(wrong)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="algorithm 'mtp' of Speculators: expected one of dflash"):
        Form("mtp", 8)
    with pytest.raises(ConfigError, match="a batch of 6 tokens for total_seq_len=4"):
        Form("dflash", 4)(numbered())
    with pytest.raises(ConfigError, match="does not capture final"):
        Form("dflash", 64)(deliver(batch(0)))
    with pytest.raises(ConfigError, match="Linear has no verifier_norm"):
        take_normed(torch.nn.Linear(1, 1))
