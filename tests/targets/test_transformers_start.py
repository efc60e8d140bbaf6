"""The start of a transformers target: what is refused there, in one sentence, and what runs one sequence a forward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from chats import consist_of_code
from fills import HIDDEN, LENGTHS, VOCAB, make_fill
from specd.config.settings import TargetConfig
from specd.errors import ConfigError, TargetError
from specd.targets.registry import load_target

SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    factory: Any = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    factory.from_config(transformers.AutoConfig.for_model("llama", **SMALL), dtype=torch.float32).save_pretrained(path)
    return path


def dummy(folder: Path, **config: Any) -> Any:
    (folder / "config.json").write_text(json.dumps(SMALL | config))
    return load_target(TargetConfig(model=f"{folder}/", load_format="dummy", device="cpu"))


def test_attention_of_another_kind_runs_one_by_one(tmp_path: Path) -> None:
    config = {"attention_chunk_size": 4, "layer_types": ["full_attention"] * 5 + ["chunked_attention"]}
    target = dummy(tmp_path, model_type="llama4_text", **config, num_local_experts=2, intermediate_size_mlp=32)
    assert target.alone == "it has layers of kind chunked_attention"


def test_a_token_that_sees_later_ones_is_no_target(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"BertLMHeadModel lets a token see later ones.*is_decoder.*take another"):
        dummy(tmp_path, model_type="bert")


def test_layers_that_lie_nowhere_are_named_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"no list of its 48 decoder layers.*L_module\.layers.*take another target"):
        dummy(tmp_path, model_type="hrm_text")


def test_a_tap_that_is_not_what_transformers_reports_is_refused_by_its_layer(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "specd.targets.transformers.target.find_layers",
        lambda decoder, count, name: [*decoder.layers[:2], *decoder.layers[3:], decoder.layers[2]],
    )
    with pytest.raises(TargetError, match=r"what its layer 2 puts out is not the state .*hidden_states\[3\]"):
        load_target(TargetConfig(model=f"{llama}/", device="cpu"))


def test_a_build_that_fails_is_one_sentence(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_args: Any) -> None:
        raise AttributeError("no attribute of that name\nsecond line")

    monkeypatch.setattr("specd.targets.transformers.target.find_decoder", nothing)
    with pytest.raises(TargetError, match=r"AttributeError: no attribute of that name\); take another target"):
        load_target(TargetConfig(model=f"{llama}/", device="cpu"))


def test_code_of_a_checkpoint_is_run_when_asked_for(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    consist_of_code(tmp_path)
    with pytest.raises(
        ConfigError, match=r"Python code that comes with the checkpoint.*target\.trust_remote_code=true"
    ):
        load_target(TargetConfig(model=f"{tmp_path}/", device="cpu"))
    target = load_target(TargetConfig(model=f"{tmp_path}/", device="cpu", trust_remote_code=True))
    fill, expected = make_fill(LENGTHS), make_fill(LENGTHS)
    target.run([fill])
    load_target(TargetConfig(model=f"{llama}/", device="cpu")).run([expected])
    assert bytes(fill.slot) == bytes(expected.slot)
