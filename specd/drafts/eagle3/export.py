"""Draft directories in the EAGLE-3 format that SGLang and vLLM read: model.safetensors and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from specd.drafts.card import card, sglang, vllm
from specd.drafts.directory import read_config
from specd.drafts.eagle3.model import Eagle3Draft, Eagle3Shape
from specd.drafts.files import write_draft
from specd.drafts.keys import check, check_architecture, flat, reading
from specd.drafts.rope import rope_scaling, rope_theta
from specd.drafts.speculators import unwrapped
from specd.drafts.weights import fill, read_weights
from specd.errors import CheckpointError, ConfigError

ARCHITECTURE = "LlamaForCausalLMEagle3"
ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
"""What an EAGLE-3 draft's config.json may call it: SpecForge, vLLM, Speculators."""
TAPS = "eagle_aux_hidden_state_layer_ids"
SURPLUS = ("rotary_emb.inv_freq", "verifier_norm.weight", "verifier_lm_head.weight", "t2d")
"""Ends of names of tensors that are the target's, or follow from others."""
READ = frozenset({
    "attention_bias", "draft_vocab_size", TAPS, "fc_norm", "has_lm_head", "head_dim", "hidden_size",
    "intermediate_size", "layer_ids", "max_position_embeddings", "norm_before_fc", "norm_before_residual",
    "norm_output", "num_attention_heads", "num_aux_hidden_states", "num_key_value_heads", "num_steps",
    "num_target_layers", "parallel_draft_heads_num_layers", "rms_norm_eps", "sliding_window", "vocab_size",
})  # fmt: skip
ONLY: dict[str, tuple[Any, ...]] = {
    "num_hidden_layers": (1,),
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "embed_requires_grad": (False,),
    "use_sliding_window": (False,),
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "next_layer_regular": (True,),
    "parallel_draft_step": (1,),
    "position_embedding_type": ("rope",),
    "partial_rotary_factor": (1,),
    "layer_types": (["full_attention"],),
}
"""Keys with which other drafts compute something else, and what they may be here."""


def save_draft(
    draft: Eagle3Draft,
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write `draft` to the directory `path`, its weights in `dtype`; `files` (tokenizer and the like) go beside them.

    Raises CheckpointError when it cannot be written.
    """
    shape = draft.shape
    weights = {name: tensor.to(dtype) for name, tensor in draft.state_dict().items() if name != "d2t"}
    if shape.draft_vocab_size < shape.vocab_size:
        guessed = torch.zeros(shape.vocab_size, dtype=torch.bool)
        guessed[draft.vocabulary.cpu()] = True
        weights |= {"d2t": draft.d2t, "t2d": guessed}
    write_draft(path, draft_config(shape, dtype), weights, files or {})


def draft_config(shape: Eagle3Shape, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a draft, with the keys that published checkpoints have.

    Readers count its layers differently: inside `eagle_config` by output, as SGLang; at the top by the layer that
    reads it, as vLLM, so one more.
    """
    return {
        "architectures": [ARCHITECTURE],
        "attention_bias": shape.attention_bias,
        "draft_vocab_size": shape.draft_vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "eagle_config": {TAPS: list(shape.taps), "use_aux_hidden_state": True},
        TAPS: [tap + 1 for tap in shape.taps],
        "fc_norm": shape.fc_norm,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "norm_before_fc": shape.norm_before_fc,
        "norm_before_residual": shape.norm_before_residual,
        "norm_output": shape.norm_output,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": shape.num_kv_heads,
        "num_steps": shape.num_steps,
        "num_target_layers": shape.num_target_layers,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": shape.rope_scaling,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab_size,
    }


def model_card(shape: Eagle3Shape, target: str, facts: Mapping[str, str]) -> bytes:
    """The README of a draft for `target`. facts: as of Objective.facts."""
    steps = shape.num_steps
    chain = f"--speculative-num-steps {steps} --speculative-eagle-topk 1 --speculative-num-draft-tokens {steps + 1}"
    least = "0.5.17" if shape.norm_before_fc else "0.5.14"
    serving = {
        f"SGLang, {least} or later": sglang(target, f"--speculative-algorithm EAGLE3 {chain}"),
        "vLLM, 0.33 or later": vllm(target, "eagle3", steps),
    }
    notes = ["Fewer guesses in a row may be faster: measure with your texts."]
    if shape.norm_before_residual:
        notes.append("Not with SGLang, which ignores norm_before_residual and guesses worse without an error.")
    if shape.norm_before_fc:
        notes.append("SGLang from 0.5.17 on: 0.5.14 does not know norm_before_fc.")
    return card("EAGLE-3", target, facts, serving, notes)


def load_draft(path: str | Path) -> Eagle3Draft:
    """The draft in the directory `path`, with float32 weights on the CPU.

    Raises ConfigError when its config.json describes something this draft does not compute, CheckpointError when a
    file is missing, unreadable, or its tensors are not the ones the config asks for.
    """
    path = Path(path)
    shape = read_shape(read_config(path), str(path))
    weights = read_weights(path, {"model.": "", "layers.0.": "midlayer."}, SURPLUS)
    draft = Eagle3Draft(shape)
    draft.published_embedding = weights.pop("embed_tokens.weight", None)
    if shape.draft_vocab_size == shape.vocab_size:
        weights.setdefault("d2t", torch.zeros(shape.vocab_size, dtype=torch.int64))
    fill(draft, weights, str(path))
    ids = draft.vocabulary
    if not (int(ids[0]) >= 0 and int(ids[-1]) < shape.vocab_size and bool((ids[1:] > ids[:-1]).all())):
        raise CheckpointError(f"{str(path)!r}: d2t is no ascending map into a vocabulary of {shape.vocab_size}")
    return draft


def read_shape(config: dict[str, Any], where: str) -> Eagle3Shape:
    """The shape in a draft's config.json. `where` names it in errors. Raises ConfigError, see load_draft."""
    check_architecture(config, where, ARCHITECTURES)
    taps = read_taps(config, where)
    speculators = "transformer_layer_config" in config
    config = flat(unwrapped(config, "eagle3", where), "eagle_config")
    only = ONLY | {
        "target_hidden_size": (config.get("hidden_size"),),
        "num_aux_hidden_states": (len(taps) or 3,),
    }
    check(config, where, read=READ, only=only)
    with reading(where):
        data = {
            "hidden_size": config["hidden_size"],
            "num_heads": config["num_attention_heads"],
            "num_kv_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
            "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            "intermediate_size": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "draft_vocab_size": config.get("draft_vocab_size", config["vocab_size"]),
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "rope_theta": rope_theta(config),
            "rope_scaling": rope_scaling(config, where),
            "max_position_embeddings": config["max_position_embeddings"],
            "taps": taps,
            "num_target_layers": config.get("num_target_layers", 0),
            "num_steps": config.get("num_steps", 7),
            "norm_output": config.get("norm_output", False),
            "fc_norm": config.get("fc_norm", False),
            "norm_before_fc": config.get("norm_before_fc", False),
            "norm_before_residual": config.get("norm_before_residual", speculators),  # as vLLM takes its absence
            "attention_bias": config.get("attention_bias", False),
        }
        shape = msgspec.convert(data, Eagle3Shape)
    if reason := shape.problem():
        raise ConfigError(f"draft {where!r}: {reason}")
    return shape


def read_taps(config: dict[str, Any], where: str) -> list[int]:
    """The target layers in a config.json, counted by output from 0; empty where it names none.

    Inside `eagle_config` they are counted by output, as SGLang does; at the top and as `layer_ids` by the layer that
    reads that output, as vLLM and Speculators do. Raises ConfigError where that gives different layers.
    """
    inside = config.get("eagle_config") or {}
    try:
        readings = {
            f"eagle_config.{TAPS}": list(inside.get(TAPS) or ()),
            "eagle_config.layer_ids": [layer - 1 for layer in inside.get("layer_ids") or ()],
            TAPS: [layer - 1 for layer in config.get(TAPS) or ()],
        }
    except (AttributeError, TypeError):
        raise ConfigError(f"draft {where!r}: config.json: {TAPS} must be lists of numbers") from None
    named = {key: ids for key, ids in readings.items() if ids}
    if any(ids != other for ids in named.values() for other in named.values()):
        means = ", ".join(f"{key} the outputs of layers {ids}" for key, ids in named.items())
        raise ConfigError(
            f"draft {where!r}: its config.json names different layers: {means} (each counts in its own way); expected "
            f"the same, keep the one it was trained with"
        )
    return next(iter(named.values()), [])
