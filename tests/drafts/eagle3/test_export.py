"""Draft directories: what engines read of them, and that specd reads back what it wrote or says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from drafts import HIDDEN, VOCAB
from eagle import CONFIG, make_eagle
from specd.drafts import registry
from specd.drafts.eagle3.drafter import Eagle3Drafter
from specd.drafts.eagle3.export import load_draft
from specd.errors import CheckpointError, ConfigError


def test_it_is_read_back_whole(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [{}, {"norm_output": True, "fc_norm": True}, {"draft_vocab_size": 0}]
    for number, options in enumerate(variants):
        objective = make_eagle(msgspec.structs.replace(CONFIG, **options))
        path = tmp_path / str(number)
        objective.export(path)
        found = load_draft(path)
        assert found.shape == objective.draft.shape
        for name, tensor in objective.draft.state_dict().items():
            assert torch.equal(tensor, found.state_dict()[name]), name
        drafter = registry.read(path).drafter(objective.embedding, objective.lm_head)
        assert isinstance(drafter, Eagle3Drafter)


def test_what_engines_read(tmp_path: Path) -> None:
    objective = make_eagle()
    objective.export(tmp_path / "draft")
    config, weights = (
        json.loads((tmp_path / "draft/config.json").read_text()),
        load_file(tmp_path / "draft/model.safetensors"),
    )
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "use_aux_hidden_state": True}
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    assert (config["vocab_size"], config["draft_vocab_size"], config["tie_word_embeddings"]) == (VOCAB, 60, False)
    assert weights["midlayer.self_attn.q_proj.weight"].shape == (HIDDEN, 2 * HIDDEN)
    assert (weights["d2t"].dtype, weights["t2d"].dtype) == (torch.int64, torch.bool)
    ids = weights["t2d"].nonzero()[:, 0]
    assert torch.equal(ids, weights["d2t"] + torch.arange(60))
    assert torch.equal(ids, objective.draft.vocabulary)
    make_eagle(msgspec.structs.replace(CONFIG, draft_vocab_size=0)).export(tmp_path / "whole")
    assert not {"d2t", "t2d"} & load_file(tmp_path / "whole/model.safetensors").keys()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, expected 1"),
        ({"norm_before_fc": True, "fc_norm": True}, "two ways of one norm"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, "rope_type is 'dynamic', expected default, "),
        ({"hidden_size": None}, "no key 'hidden_size'"),
        ({"embed_requires_grad": True}, "embed_requires_grad is True, expected False"),
        ({"eagle_config": {"use_last_layernorm": False}}, "use_last_layernorm is False, expected True"),
        ({"use_sliding_window": True}, "use_sliding_window is True, expected False"),
        ({"model_type": "qwen3"}, "model_type is 'qwen3', expected 'llama'"),
        ({"num_aux_hidden_states": 4}, "num_aux_hidden_states is 4, expected 3"),
        ({"is_neox_style": False}, "is_neox_style=False, which specd does not know"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, "names different layers"),
        ({"architectures": ["DFlashDraftModel"]}, "architectures is .'DFlashDraftModel'., expected one of Llama"),
        ({"head_dim": None, "num_attention_heads": 0}, "config.json: integer division or modulo by zero"),
        ({"rope_theta": "x"}, "rope_theta is 'x', expected a positive number"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps -1.0 is no number from 0 on"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan is no number from 0 on"),
        ({"num_steps": 10**9}, "num_steps 1000000000 exceeds 256"),
        ({"draft_vocab_size": 200}, "draft_vocab_size 200 exceeds the target's vocabulary of 97"),
        ({"eagle_aux_hidden_state_layer_ids": 3}, "must be lists of numbers"),
    ],
)
def test_another_computation_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    make_eagle().export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=reason):
        load_draft(tmp_path)


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    make_eagle().export(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    for changed, reason in (
        ({"norm.weight": weights["norm.weight"][:5].clone()}, r"1 tensors differ.*'norm.weight': found \[5\]"),
        ({"extra": torch.zeros(2)}, "'extra': found .2., expected none"),
        ({"d2t": weights["d2t"].flip(0).contiguous()}, "d2t is no ascending map"),
        ({"d2t": weights["d2t"] + 90}, "d2t is no ascending map"),
        ({"d2t": weights["d2t"].float()}, "d2t is float32, expected int64, int32"),
        ({"norm.weight": weights["norm.weight"].to(torch.float8_e4m3fn)}, "norm.weight is float8_e4m3fn, expected fl"),
        ({"fc.weight": weights["fc.weight"].int()}, "fc.weight is int32, expected float32"),
        ({"fc.weight": weights["fc.weight"] / 0}, "fc.weight has values that are no finite"),
        ({"fc.weight": weights["fc.weight"].double() * 1e300}, "fc.weight has values that are no finite"),
    ):
        save_file(weights | changed, path)
        with pytest.raises(CheckpointError, match=reason):
            load_draft(tmp_path)


def test_a_map_beside_the_whole_vocabulary_has_to_say_so(tmp_path: Path) -> None:
    make_eagle(msgspec.structs.replace(CONFIG, draft_vocab_size=0)).export(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"d2t": torch.zeros(VOCAB, dtype=torch.int32)}, path)
    assert torch.equal(load_draft(tmp_path).vocabulary, torch.arange(VOCAB))
    save_file(weights | {"d2t": torch.ones(VOCAB, dtype=torch.int64)}, path)
    with pytest.raises(CheckpointError, match="d2t is no ascending map"):
        load_draft(tmp_path)
