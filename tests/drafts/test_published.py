"""Published forms of draft directories: each loads as the same draft, and what changes the draft is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafts import CONFIG as DRAFT
from drafts import load_draft as load_dflash
from drafts import make_draft
from drafts import save_draft as save_dflash
from eagle import CONFIG as EAGLE
from eagle import make_eagle
from specd.drafts import registry
from specd.drafts.eagle3.export import load_draft as load_eagle3
from specd.drafts.eagle3.export import save_draft as save_eagle3
from specd.errors import CheckpointError, ConfigError

Config = dict[str, Any]
Weights = dict[str, Tensor]
Form = Callable[[Config, Weights], tuple[Config, Weights]]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def change(**changes: Any) -> Form:
    """Keys at the top; None takes one away."""

    def form(config: Config, weights: Weights) -> tuple[Config, Weights]:
        merged = {**config, **changes}
        return {key: value for key, value in merged.items() if value is not None}, weights

    return form


def inside(section: str, *keys: str) -> Form:
    """Keys moved into a section, or out of it where they stand in it."""

    def form(config: Config, weights: Weights) -> tuple[Config, Weights]:
        config, part = dict(config), dict(config[section])
        for key in keys:
            home, other = (part, config) if key in part else (config, part)
            other[key] = home.pop(key)
        return {**config, section: part}, weights

    return form


def renamed(change: Callable[[str], str]) -> Form:
    return lambda config, weights: (config, {change(name): tensor for name, tensor in weights.items()})


def beside(**tensors: Tensor) -> Form:
    extra = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return lambda config, weights: (config, weights | extra)


def speculators(kind: str, **own: Any) -> Form:
    """The form of Speculators 0.9."""

    def form(config: Config, weights: Weights) -> tuple[Config, Weights]:
        layers = {
            key: config[key]
            for key in (
                "attention_bias", "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
                "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers",
                "num_key_value_heads", "rms_norm_eps", "vocab_size", "tie_word_embeddings",
            )
        }  # fmt: skip
        layers |= {key: config[key] for key in ("layer_types", "sliding_window") if config.get(key)}
        rope = {"rope_theta": config["rope_theta"], "rope_type": "default"}
        layers |= {"rope_parameters": rope, "pad_token_id": None}
        return {
            "architectures": ["DFlashDraftModel" if kind == "dflash" else "Eagle3DraftModel"],
            "auto_map": {"": "config.Some"},
            "draft_vocab_size": config.get("draft_vocab_size", config["vocab_size"]),
            "dtype": "float32",
            "speculators_config": {"algorithm": kind, "verifier": {"name_or_path": "x"}},
            "speculators_model_type": kind,
            "speculators_version": "0.9.0",
            "target_hidden_size": None,
            "transformer_layer_config": layers,
            "transformers_version": "5.17.0",
            **own,
        }, {name.replace("midlayer.", "layers.0."): tensor for name, tensor in weights.items()}

    return form


DFLASH: dict[str, Form] = {
    "as written": change(),
    "block_size nested": inside("dflash_config", "block_size"),
    "num_target_layers nested": inside("dflash_config", "num_target_layers"),
    "all at the top": inside("dflash_config", "mask_token_id", "target_layer_ids"),
    "no num_target_layers": change(num_target_layers=None),
    "no layer_types": change(layer_types=None),
    "rope_parameters": change(rope_theta=None, rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}),
    "rope_parameters by type": change(
        rope_theta=None,
        rope_parameters={"full_attention": {"rope_theta": 5000.0}, "sliding_attention": {"rope_theta": 1.0}},
    ),
    "of a target that transforms": lambda config, weights: (
        config
        | {
            "dflash_config": config["dflash_config"]
            | {"input_embedding_scale": 73.3, "output_multiplier": 2.0, "final_logit_softcapping": 30}
        },
        weights,
    ),
    "of AngelSpec": change(target_hidden_size=32, target_num_hidden_layers=8),
    "of transformers": change(_name_or_path="x", transformers_version="4.57.1", torch_dtype="bfloat16", id2label={}),
    "neutral values": change(is_neox_style=True, partial_rotary_factor=1.0, use_swa=False, mlp_bias=False),
    "prefixed": renamed(lambda name: "model." + name),
    "with the target's tensors": beside(
        embed_tokens__weight=torch.ones(97, 32), lm_head__weight=torch.ones(97, 32),
        rotary_emb__inv_freq=torch.ones(4), layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),
    ),
    "speculators": speculators(
        "dflash", block_size=4, aux_hidden_state_layer_ids=[2, 4, 6], mask_token_id=3, sample_from_anchor=False,
        sliding_window_non_causal=False,
    ),
}  # fmt: skip

EAGLE3: dict[str, Form] = {
    "as written": change(),
    "layers nested alone": change(eagle_aux_hidden_state_layer_ids=None),
    "layers at the top alone": change(eagle_config=None),
    "layers by their reader": change(
        eagle_config={"layer_ids": [2, 4, 5], "use_aux_hidden_state": True}, eagle_aux_hidden_state_layer_ids=None
    ),
    "norms nested": inside("eagle_config", "norm_output", "norm_before_fc"),
    "no num_target_layers": change(num_target_layers=None),
    "of ModelOpt": lambda config, weights: (
        config
        | {
            "eagle_config": config["eagle_config"] | {
                "use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False,
                "next_layer_regular": True, "parallel_draft_step": 1, "has_lm_head": True, "head_dim": 8,
            },
            "position_embedding_type": "rope", "torch_dtype": "bfloat16", "eagle_aux_hidden_state_layer_ids": None,
        },
        weights,
    ),
    "of vLLM": change(architectures=["Eagle3LlamaForCausalLM"]),
    "layers.0": renamed(lambda name: name.replace("midlayer.", "layers.0.")),
    "prefixed layers.0": renamed(
        lambda name: (
            name if name in ("d2t", "t2d", "lm_head.weight") else "model." + name.replace("midlayer.", "layers.0.")
        )
    ),
    "without t2d": lambda config, weights: (config, {key: one for key, one in weights.items() if key != "t2d"}),
    "with the embedding": beside(embed_tokens__weight=torch.ones(97, 32), midlayer__rotary_emb__inv_freq=torch.ones(4)),
    "speculators": speculators(
        "eagle3", eagle_aux_hidden_state_layer_ids=[2, 4, 5], norm_before_residual=False, norm_before_fc=False,
        norm_output=False, fc_norm=False, embed_requires_grad=False,
    ),
}  # fmt: skip


def rewrite(path: Path, form: Form) -> None:
    config, weights = form(json.loads((path / "config.json").read_text()), load_file(path / "model.safetensors"))
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors")


def equal(ours: Any, found: Any, **shape: Any) -> None:
    assert found.shape == msgspec.structs.replace(ours.shape, **shape)
    assert ours.state_dict().keys() == found.state_dict().keys()
    assert all(torch.equal(one, found.state_dict()[name]) for name, one in ours.state_dict().items())


@pytest.mark.parametrize("name", DFLASH)
def test_published_forms_load(tmp_path: Path, name: str) -> None:
    objective = make_draft()
    objective.export(tmp_path)
    rewrite(tmp_path, DFLASH[name])
    # Where nothing says how deep the target is, it is as deep as its last tap needs.
    unknown: dict[str, Any] = {"num_target_layers": 7} if name in ("no num_target_layers", "speculators") else {}
    if name == "speculators":
        unknown["tie_word_embeddings"] = True
    if name == "of a target that transforms":
        unknown |= {"input_embedding_scale": 73.3, "output_multiplier": 2.0, "final_logit_softcapping": 30.0}
    equal(objective.draft, load_dflash(tmp_path), **unknown)
    assert registry.read(tmp_path).drafter(objective.embedding, objective.lm_head).taps == (1, 3, 5)


def test_a_dflash_draft_that_names_no_layers_reads_as_many_as_it_has_evenly_spread(tmp_path: Path) -> None:
    objective = make_draft(msgspec.structs.replace(DRAFT, num_layers=3))
    objective.export(tmp_path)
    rewrite(tmp_path, change(dflash_config={"mask_token_id": 3}))
    equal(objective.draft, load_dflash(tmp_path))
    rewrite(tmp_path, change(num_target_layers=None))
    with pytest.raises(ConfigError, match="no key 'num_target_layers'"):
        load_dflash(tmp_path)


@pytest.mark.parametrize("name", EAGLE3)
def test_published_forms_of_eagle3_load(tmp_path: Path, name: str) -> None:
    objective = make_eagle()
    objective.export(tmp_path)
    rewrite(tmp_path, EAGLE3[name])
    unknown = {"num_target_layers": 0} if name in ("no num_target_layers", "speculators") else {}
    if name == "speculators":
        unknown["num_steps"] = 7
    equal(objective.draft, load_eagle3(tmp_path), **unknown)
    assert registry.read(tmp_path).drafter(objective.embedding, objective.lm_head).taps == (1, 3, 4)


def test_an_eagle3_draft_that_names_no_layers_reads_those_that_engines_take(tmp_path: Path) -> None:
    objective = make_eagle()
    objective.export(tmp_path)
    rewrite(tmp_path, change(eagle_config=None, eagle_aux_hidden_state_layer_ids=None, num_target_layers=None))
    draft = registry.read(tmp_path)
    assert draft.drafter(objective.embedding, objective.lm_head, 8).taps == (1, 3, 4)
    assert draft.drafter(objective.embedding, objective.lm_head, 36).taps == (1, 17, 32)
    with pytest.raises(ConfigError, match=r"names no layers .* expected the number of its target's layers"):
        draft.drafter(objective.embedding, objective.lm_head)


def test_an_embedding_of_its_own_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objective = make_eagle()
    objective.export(tmp_path)
    for embedding, said in ((objective.embedding, 0), (objective.embedding + 1, 1), (objective.embedding[:5], 2)):
        rewrite(tmp_path, beside(embed_tokens__weight=embedding.bfloat16()))
        registry.read(tmp_path).drafter(objective.embedding, objective.lm_head)
        assert sum("has an embedding of its own" in record.message for record in caplog.records) == said


def test_the_whole_vocabulary_needs_no_map(tmp_path: Path) -> None:
    objective = make_eagle(msgspec.structs.replace(EAGLE, draft_vocab_size=0))
    objective.export(tmp_path)
    rewrite(tmp_path, change(draft_vocab_size=None))
    equal(objective.draft, load_eagle3(tmp_path))


@pytest.mark.parametrize("make", [make_draft, make_eagle])
def test_sharded_weights_are_read_together(tmp_path: Path, make: Callable[[], Any]) -> None:
    objective = make()
    objective.export(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    index: dict[str, str] = {}
    for number, names in enumerate((sorted(weights)[::2], sorted(weights)[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in names}, tmp_path / file)
        index |= dict.fromkeys(names, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    equal(objective.draft, (load_dflash if make is make_draft else load_eagle3)(tmp_path))


@pytest.mark.parametrize("scaling", [LLAMA3, YARN])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_rotations_and_biases_come_back(tmp_path: Path, scaling: dict[str, Any], key: str) -> None:
    for make, load, kinds in ((make_draft, load_dflash, 2), (make_eagle, load_eagle3, 1)):
        path = tmp_path / make.__name__
        make().export(path)

        def form(config: Config, weights: Weights, kinds: int = kinds) -> tuple[Config, Weights]:
            biases = {
                name.replace(".weight", ".bias"): torch.linspace(-1, 1, tensor.shape[0])
                for name, tensor in weights.items()
                if "self_attn" in name and "norm" not in name
            }
            assert len(biases) == 4 * kinds
            return {**config, "attention_bias": True, key: {"rope_theta": 5000.0, **scaling}}, weights | biases

        rewrite(path, form)
        found: Any = load(path)
        assert found.shape.rope_scaling == scaling
        assert isinstance(found.shape.rope_scaling["original_max_position_embeddings"], int), "as readers want it"
        assert found.shape.attention_bias
        positions = torch.tensor([0, 5, 400])
        rotations = getattr(found, "rotary_emb", None) or found.rope
        plain = load(path)
        plain = type(found)(msgspec.structs.replace(found.shape, rope_scaling=None))
        other = getattr(plain, "rotary_emb", None) or plain.rope
        assert not torch.equal(rotations(positions, torch.float32)[0], other(positions, torch.float32)[0])
        # Written again it is the same draft.
        save: Any = save_dflash if make is make_draft else save_eagle3
        save(found, path / "again", dtype=torch.float32)
        equal(found, load(path / "again"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"input_embedding_scale": 0},
            "input_embedding_scale 0.0, output_multiplier 1.0 and final",
        ),
        ({"use_swa": True, "swa_window_size": 2048}, "use_swa is True, expected False"),
        ({"swa_window_size": 2048}, "swa_window_size=2048, which specd does not know"),
        ({"sample_from_anchor": True}, "sample_from_anchor is True, expected False"),
        ({"is_neox_style": False}, "is_neox_style is False, expected True"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25, expected 1"),
        ({"selector_rank": 256}, "selector_rank is 256, expected 0"),
        ({"attention_sink_bias": True}, "attention_sink_bias is True, expected False"),
        ({"attention_value_scale": 2.0}, "attention_value_scale is 2.0, expected none"),
        ({"quantization_config": {"bits": 4}, "brand_new": 1}, "has brand_new=1, quantization_config="),
        ({"draft_vocab_size": 60}, "draft_vocab_size is 60, expected 97"),
        ({"target_hidden_size": 64}, "target_hidden_size is 64, expected 32"),
        ({"dflash_config": 3}, "dflash_config is 3, expected an object"),
        ({"num_attention_heads": 3}, "num_heads 3 is not a multiple of num_kv_heads 2"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_keys_that_change_the_computation_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], reason: str, nested: bool
) -> None:
    make_draft().export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if nested and "dflash_config" not in changes:
        changes = {"dflash_config": config["dflash_config"] | changes}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=reason):
        registry.read(tmp_path)


@pytest.mark.parametrize(("key", "where"), [("is_causal", None), ("causal", "dflash_config")])
@pytest.mark.parametrize("causal", [True, False, None])
def test_causality_is_read_as_readers_of_the_format_do(
    tmp_path: Path, key: str, where: str | None, causal: bool | None
) -> None:
    make_draft().export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    (config[where] if where else config)[key] = causal
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = load_dflash(tmp_path).shape
    expected = [True, False] if causal is None else [causal] * 2
    assert [shape.causal(kind) for kind in shape.layer_types] == expected
    assert [shape.window(kind) for kind in shape.layer_types] == [6, 0]


def test_speculators_forms_of_other_drafts_are_refused(tmp_path: Path) -> None:
    make_draft().export(tmp_path)
    rewrite(tmp_path, speculators("dflash2", architectures=["DFlashDraftModel"]))
    with pytest.raises(ConfigError, match="speculators_model_type is 'dflash2', expected 'dflash'"):
        registry.read(tmp_path)


def test_a_speculators_draft_that_says_nothing_of_its_residual_adds_to_the_normed_state(tmp_path: Path) -> None:
    make_eagle().export(tmp_path)
    rewrite(tmp_path, speculators("eagle3"))
    assert load_eagle3(tmp_path).shape.norm_before_residual


def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess
    import sys

    objective = make_draft()
    objective.export(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights, pytorch_model.bin") as refused:
        registry.read(tmp_path)
    command = str(refused.value).splitlines()[-1]
    code = command.removeprefix('python -c "').removesuffix('"')
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    equal(objective.draft, load_dflash(tmp_path))


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("[]", "is no index of weights"),
        ("{", "is no index of weights"),
        ('{"weight_map": {"fc.weight": "../other.safetensors"}}', "names '../other.safetensors': expected a file"),
        ('{"weight_map": {"fc.weight": "gone.safetensors"}}', "names 'gone.safetensors': expected a file"),
        ('{"weight_map": {"fc.weight": 3}}', "names 3: expected a file"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, index: str, reason: str) -> None:
    make_draft().export(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=reason):
        registry.read(tmp_path)


def test_two_tensors_of_one_meaning_are_refused(tmp_path: Path) -> None:
    make_draft().export(tmp_path)
    rewrite(tmp_path, beside(model__fc__weight=torch.ones(2)))
    with pytest.raises(CheckpointError, match=r"two of its tensors mean 'fc.weight'"):
        registry.read(tmp_path)
