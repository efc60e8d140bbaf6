"""The presets: their shapes are the published models', their recipes fit the configuration, and each family runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from specd.config.load import convert
from specd.config.presets import Preset, preset, presets
from specd.config.settings import (
    CaptureConfig,
    RingConfig,
    RunConfig,
    TargetConfig,
)
from specd.drafts.backbone.form import DFLASH
from specd.drafts.backbone.shape import draft_shape as block_shape
from specd.drafts.dflash.settings import DFlashConfig
from specd.drafts.dflash2.objective import DFLASH2
from specd.drafts.dflash2.settings import DFlash2Config
from specd.drafts.dspark.objective import DSPARK
from specd.drafts.dspark.settings import DSparkConfig
from specd.drafts.eagle3.model import Eagle3Draft, draft_shape
from specd.drafts.eagle3.settings import Eagle3Config
from specd.drafts.taps import eagle3_taps, spread_taps
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob
from specd.targets.registry import load_target
from specd.targets.source import dummy_config, resolve
from specd.targets.transformers.load import load_causal_lm

PARAMETERS = {"smollm2-135m": 134.5e6, "Qwen3-4B": 4.02e9, "Qwen3-8B": 8.19e9, "Qwen3-30B-A3B-FP8": 30.5e9}
"""As their model cards state them; Qwen3-4B's and SmolLM2's head is tied."""

TAPS = {"smollm2-135m": (1, 8, 14, 20, 27), "Qwen3-30B-A3B-FP8": (1, 12, 23, 34, 45)}
REDUCED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_window_layers": 6,
    "vocab_size": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def known(name: str) -> Preset:
    found = preset(name)
    assert found is not None
    return found


def test_the_presets_are_those_the_readme_names() -> None:
    assert set(presets()) == set(PARAMETERS)
    assert preset("qwen3-8B") == preset("Qwen/Qwen3-8B") == known("Qwen3-8B")
    assert preset("qwen3-9b") is None


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_the_published_models(name: str) -> None:
    """The whole model on the meta device: it costs no memory, and its size is the published one."""
    settings = dummy_config(resolve(name, need="shape"))
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    factory: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = factory.from_config(config, dtype=torch.bfloat16)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(PARAMETERS[name], rel=0.003)
    assert config.rope_parameters["rope_theta"] == (1e5 if name.startswith("smollm2") else 1e6)


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipes_fit_the_configuration(name: str) -> None:
    recipe = known(name)
    run = convert({"method": "dflash"} | recipe.run["dflash"], RunConfig, f"preset {name}")
    draft = convert(run.draft, DFlashConfig, f"preset {name}")
    capture = convert(recipe.capture, CaptureConfig, f"preset {name}")
    ring = convert(recipe.ring, RingConfig, f"preset {name}")
    layers = recipe.config["num_hidden_layers"]
    taps = spread_taps(layers, draft.num_taps)
    assert taps == TAPS.get(name, (1, 9, 17, 25, 33))
    assert draft.num_taps == capture.num_taps
    assert CaptureSpec(taps=taps).problem(layers) is None
    assert run.data.batch_tokens <= ring.slot_tokens
    assert run.data.max_length <= run.data.batch_tokens
    assert 0 <= draft.mask_token_id < recipe.config["vocab_size"]
    assert draft.mask_token_id not in {recipe.config["bos_token_id"], recipe.config["eos_token_id"]}
    if name.startswith("Qwen3"):
        assert (draft.num_layers, draft.block_size, draft.num_anchors) == (5, 16, 512)
        assert draft.mask_token_id == 151669
    else:
        assert run.data.path == "specd:demo/train.jsonl"


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipes_of_dflash2_fit_the_configuration(name: str) -> None:
    recipe = known(name)
    run = convert({"method": "dflash2"} | recipe.run["dflash2"], RunConfig, f"preset {name}")
    draft = convert(run.draft, DFlash2Config, f"preset {name}")
    taps = spread_taps(recipe.config["num_hidden_layers"], 5)
    shape = block_shape(draft, recipe.config, taps, DFLASH2.shape, DFLASH2.own)
    assert shape.block_size == 8
    plain = recipe.run["dflash"]
    assert {key: run.draft[key] for key in ("mask_token_id", "num_layers", "num_anchors")} == {
        key: plain["draft"][key] for key in ("mask_token_id", "num_layers", "num_anchors")
    }
    assert recipe.run["dflash2"]["data"] == plain["data"]
    if name.startswith("Qwen3-30B"):
        with torch.device("meta"):
            networks = (DFLASH2.network(shape), DFLASH.network(shape))
        whole, backbone = (sum(weight.numel() for weight in network.parameters()) for network in networks)
        assert whole - backbone == pytest.approx(88.9e6, rel=0.01)


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipes_of_dspark_fit_the_configuration(name: str) -> None:
    recipe = known(name)
    run = convert({"method": "dspark"} | recipe.run["dspark"], RunConfig, f"preset {name}")
    draft = convert(run.draft, DSparkConfig, f"preset {name}")
    taps = spread_taps(recipe.config["num_hidden_layers"], 5)
    shape = block_shape(draft, recipe.config, taps, DSPARK.shape, DSPARK.own)
    assert (shape.num_guesses, draft.loss_decay) == (7, 4.0)
    ring = convert(recipe.ring, RingConfig, f"preset {name}")
    states = draft.num_taps + 1
    assert run.data.batch_tokens * states <= ring.slot_tokens * recipe.capture["num_taps"], "what a daemon's slots hold"
    assert recipe.run["dspark"]["data"] == recipe.run["dflash"]["data"]
    assert recipe.run["dspark"]["train"] == recipe.run["dflash"]["train"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipes_of_eagle3_fit_the_configuration(name: str) -> None:
    recipe = known(name)
    run = convert({"method": "eagle3"} | recipe.run["eagle3"], RunConfig, f"preset {name}")
    draft = convert(run.draft, Eagle3Config, f"preset {name}")
    ring, layers = convert(recipe.ring, RingConfig, f"preset {name}"), recipe.config["num_hidden_layers"]
    taps = eagle3_taps(layers)
    assert taps == {30: (1, 14, 26), 36: (1, 17, 32), 48: (1, 23, 44)}[layers]
    assert CaptureSpec(taps=taps, final=True).problem(layers) is None
    assert len(taps) + 1 <= recipe.capture["num_taps"], "what a daemon's slots hold"
    assert run.data.max_length <= run.data.batch_tokens <= ring.slot_tokens
    shape = draft_shape(draft, recipe.config, taps)
    assert shape.draft_vocab_size < shape.vocab_size
    if name.startswith("Qwen3"):
        assert (draft.num_steps, draft.draft_vocab_size, run.train.clip, run.train.lr) == (7, 32_000, 0.5, 1e-4)
    else:
        assert run.data.path == "specd:demo/train.jsonl"
    if name.startswith("Qwen3-30B"):
        with torch.device("meta"):
            trained = sum(weight.numel() for weight in Eagle3Draft(shape).parameters())
        assert trained == pytest.approx(183e6, rel=0.01)


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_preset_runs_at_reduced_size(name: str, tmp_path: Path) -> None:
    """Dummy weights, the family's own config with smaller sizes: packed states equal plain runs of each sequence."""
    config = {key: REDUCED.get(key, value) for key, value in known(name).config.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = load_target(
        TargetConfig(model=f"{tmp_path}/", load_format="dummy", num_layers=5, dtype="float32", device="cpu")
    )
    assert (target.contract.num_layers, target.contract.model_type) == (5, known(name).config["model_type"])
    assert bool(target.contract.artifacts["lm_head"].same_as) == config["tie_word_embeddings"]
    spec = CaptureSpec(taps=(0, 1, 3), final=True, dtype="float32")
    lengths = (9, 1, 14)
    layout = slot_layout(spec, 64, sum(lengths))
    fill = CaptureJob(
        tokens=np.random.default_rng(0).integers(0, 256, sum(lengths)).astype(np.int32),
        lengths=np.array(lengths, dtype=np.int32),
        spec=spec,
        layout=layout,
        slot=memoryview(bytearray(layout.nbytes)),
    )
    target.run([fill])
    states = {
        ref.name: torch.frombuffer(fill.slot, dtype=torch.float32, count=ref.nbytes // 4, offset=ref.offset).view(
            ref.shape
        )
        for ref in layout.tensors
    }
    model: Any = load_causal_lm(f"{tmp_path}/", load_format="dummy", num_layers=5, dtype="float32")[0]
    start = 0
    for piece in torch.split(torch.from_numpy(fill.tokens.astype(np.int64)), list(lengths)):
        plain = model(input_ids=piece[None], output_hidden_states=True, use_cache=False)
        rows = slice(start, start + len(piece))
        for index, tap in enumerate(spec.taps):
            torch.testing.assert_close(
                states["taps"][rows, index], plain.hidden_states[tap + 1][0], rtol=1e-4, atol=1e-6
            )
        torch.testing.assert_close(states["final"][rows], plain.hidden_states[-1][0], rtol=1e-4, atol=1e-5)
        start += len(piece)


def test_every_preset_loads_and_its_overrides_fit() -> None:
    assert presets()
    for name in presets():
        found = preset(name)
        assert found is not None
        assert found.name.lower() == name.lower()
        convert(found.capture, CaptureConfig, name)
        convert(found.ring, RingConfig, name)
        for method, recipe in found.run.items():
            convert({"method": method} | recipe, RunConfig, name)
        assert found.config["num_hidden_layers"] > 0


def test_a_preset_is_found_however_it_is_written() -> None:
    plain = preset("smollm2-135m")
    assert plain is not None
    assert preset("SmolLM2-135M") == preset("huggingfacetb/smollm2-135m-instruct") == plain
    assert preset("someone/SmolLM2-135M") is None, "who knows whose that is"
    assert preset("a/b/smollm2-135m") is None
    assert preset("no-such-model") is None
    assert preset("") is None
