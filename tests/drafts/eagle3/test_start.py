"""An EAGLE-3 draft that begins with the weights of another: whose they are, its vocabulary, and what must fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from drafts import CONTRACT, VOCAB, make_batch
from eagle import CONFIG, deliver, make_eagle, parts
from specd.drafts.eagle3.method import Eagle3Method
from specd.drafts.eagle3.objective import Eagle3
from specd.errors import ConfigError


def begin(path: Path, counts: Any = None, **changes: Any) -> Eagle3:
    config = msgspec.structs.replace(CONFIG, init=str(path), **changes)
    Eagle3Method.check(config, "tiny")
    Eagle3Method.capture(config, CONTRACT)
    target = parts() if counts is None else parts()._replace(label_counts=counts)
    return Eagle3(config, target, seed=7)


@pytest.mark.parametrize("shape", [{}, {"norm_before_fc": True, "norm_before_residual": True, "attention_bias": True}])
def test_it_begins_where_another_ended(tmp_path: Path, shape: dict[str, bool]) -> None:
    first = make_eagle(shape=shape)
    first.export(tmp_path / "draft")
    again, delivery = begin(tmp_path), deliver(make_batch())
    assert again.draft.shape == first.draft.shape
    for name, tensor in first.draft.state_dict().items():
        assert torch.equal(tensor, again.draft.state_dict()[name]), name
    assert torch.equal(again.loss(delivery).sum, first.loss(delivery).sum)
    assert again.facts()["initial weights"].startswith(f"{tmp_path / 'draft'} (sha256 ")
    assert "initial weights" not in first.facts()
    assert begin(tmp_path, num_steps=2).draft.shape.num_steps == 2


def test_it_keeps_its_vocabulary_whatever_the_labels_are(tmp_path: Path) -> None:
    first = make_eagle()
    first.export(tmp_path)
    own = first.draft.vocabulary
    counts = np.ones(VOCAB, np.int64)
    counts[own.numpy()[:10]] = 50
    again = begin(tmp_path, counts)
    assert torch.equal(again.draft.vocabulary, own)
    share = counts[own.numpy()].sum() / counts.sum()
    assert again.facts()["draft vocabulary"] == f"60 of 97, {share:.1%} of labels"
    counts = np.zeros(VOCAB, np.int64)
    counts[np.setdiff1d(np.arange(VOCAB), own.numpy())] = 5
    with pytest.raises(ConfigError, match=r"the vocabulary of draft.init=.* covers 0% of the labels: expected"):
        begin(tmp_path, counts)


def test_a_draft_that_names_no_layers_reads_the_usual_ones(tmp_path: Path) -> None:
    make_eagle().export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("eagle_config", "eagle_aux_hidden_state_layer_ids", "num_target_layers"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (begin(tmp_path).draft.shape.taps, begin(tmp_path).draft.shape.num_target_layers) == ((1, 3, 4), 8)


def test_its_own_layers_are_captured(tmp_path: Path) -> None:
    make_eagle().export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"eagle_config": None}
    config |= {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Eagle3Method.capture(msgspec.structs.replace(CONFIG, init=str(tmp_path)), CONTRACT).taps == (0, 2, 6)
    assert begin(tmp_path).draft.shape.taps == (0, 2, 6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"draft_vocab_size": 50}, "its draft_vocab_size is 60, expected this run's 50: change draft.draft_vocab_size"),
        ({"draft_vocab_size": 0}, "its draft_vocab_size is 60, expected this run's 97"),
        ({"norm_output": True}, "its norm_output is False, expected this run's True: change draft.norm_output"),
        ({"fc_norm": True}, "its fc_norm is False, expected this run's True"),
        ({"head_dim": 4}, "its head_dim is 8, expected this run's 4"),
        ({"intermediate_size": 40}, "its intermediate_size is 48, expected this run's 40"),
    ],
)
def test_a_draft_of_another_shape_is_refused_by_what_differs(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    make_eagle().export(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        begin(tmp_path, **changes)


def test_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    make_eagle().export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"eagle_config": None}
    (tmp_path / "config.json").write_text(json.dumps(config | {"eagle_aux_hidden_state_layer_ids": [1, 3, 5, 7]}))
    with pytest.raises(ConfigError, match="it reads 4 layers, expected 3"):
        begin(tmp_path)


def test_layers_that_the_target_lacks_are_refused(tmp_path: Path) -> None:
    make_eagle().export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"eagle_config": None, "num_target_layers": 20}
    (tmp_path / "config.json").write_text(json.dumps(config | {"eagle_aux_hidden_state_layer_ids": [2, 9, 17]}))
    with pytest.raises(ConfigError, match=r"is a draft for another target: taps \[1, 8, 16\]"):
        begin(tmp_path)
