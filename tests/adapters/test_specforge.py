"""Batches for SpecForge: what lies where. tests/oracles/test_adapters.py compares them with its own."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from samples import batch
from specd.adapters.specforge import Form, capture
from specd.errors import ConfigError
from specd.protocol.batch import Delivery


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SpecForge, as far as a batch needs it."""
    contracts = types.ModuleType("specforge.runtime.contracts")
    vars(contracts)["TrainBatch"] = types.SimpleNamespace
    for name in ("specforge", "specforge.runtime"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, contracts.__name__, contracts)


def numbered(lengths: tuple[int, ...] = (3, 1, 2)) -> Delivery:
    """Token t has the state t."""
    made = batch(0, lengths)
    made.tokens[:] = np.arange(made.num_tokens)
    states = torch.arange(made.num_tokens).float()
    return Delivery(made, states[:, None, None].repeat(1, 2, 4), states[:, None].repeat(1, 4))


@pytest.mark.usefixtures("installed")
def test_sequences_lie_side_by_side() -> None:
    item = Form("dspark")(numbered())
    assert sorted(item.tensors) == ["hidden_states", "input_ids", "loss_mask", "target_last_hidden_states"]
    assert item.tensors["input_ids"].tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert item.tensors["hidden_states"][:, :, 0].tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert item.tensors["loss_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert item.tensors["hidden_states"].shape == (3, 3, 8)
    assert (item.strategy, item.sample_ids) == ("dspark", ["0", "1", "2"])
    assert item.metadata == {"target_repr": None, "ttt_length": None}


@pytest.mark.usefixtures("installed")
def test_an_eagles_last_token_has_no_teacher() -> None:
    delivery = numbered()
    item = Form("eagle3", ttt_length=7)(delivery)
    assert item.tensors["loss_mask"].tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert item.tensors["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert item.tensors["target"].shape == (3, 3, 4)
    assert item.metadata == {"target_repr": "hidden_state", "ttt_length": 7}
    assert delivery.batch.loss_mask.all()


def test_layers_are_numbers_of_taps() -> None:
    assert capture("eagle3", [1, 17, 32]).taps == capture("dflash", (1, 17, 32)).taps == (1, 17, 32)
    assert [capture(name, [1]).final for name in ("dflash", "domino", "dspark", "eagle3")] == [False, False, True, True]
    with pytest.raises(ConfigError, match=r"layer ids \[3, 3\]: expected ascending ones from 0 on"):
        capture("eagle3", [3, 3])
    with pytest.raises(ConfigError, match="algorithm 'medusa' of SpecForge: expected one of dflash"):
        capture("medusa", [1])


@pytest.mark.usefixtures("installed")
def test_peagle_takes_one_sequence() -> None:
    assert Form("peagle")(numbered((4,))).tensors["input_ids"].shape == (1, 4)
    with pytest.raises(ConfigError, match=r"a batch of 3 sequences .*max_batch_sequences=1"):
        Form("peagle")(numbered())


def test_specforge_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "specforge", None)
    with pytest.raises(ConfigError, match=r"SpecForge cannot be imported: .*pip install specforge"):
        Form("dflash")
