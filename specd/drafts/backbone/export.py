"""Directories of block drafts in the published format: written, and read whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from specd.drafts.backbone.form import Form
from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.shape import BlockShape
from specd.drafts.directory import read_config
from specd.drafts.files import write_draft
from specd.drafts.keys import check, check_architecture, flat, reading
from specd.drafts.rope import rope_scaling, rope_theta
from specd.drafts.speculators import unwrapped
from specd.drafts.taps import spread_taps
from specd.drafts.weights import fill, read_weights
from specd.errors import ConfigError

SURPLUS = ("embed_tokens.weight", "lm_head.weight", "rotary_emb.inv_freq", "verifier_norm.weight", "d2t", "t2d")
"""Ends of names of tensors that are the target's, or follow from config.json."""
READ = frozenset({
    "attention_bias", "block_size", "causal", "final_logit_softcapping", "head_dim", "hidden_size",
    "input_embedding_scale", "intermediate_size", "is_causal", "layer_types", "logit_scale", "mask_token_id",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "num_target_layers",
    "output_multiplier", "rms_norm_eps", "sliding_window", "target_layer_ids", "tie_word_embeddings",
    "use_sliding_window", "vocab_size",
})  # fmt: skip
"""Keys that are read, or that leave the order of the draft's logits as it is."""
ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("qwen3",),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "use_swa": (False,),
    "sample_from_anchor": (False,),
    "is_neox_style": (True,),
    "rope_is_neox_style": (True,),
    "partial_rotary_factor": (1,),
    "use_gemma_norm": (False,),
    "use_qk_norm": (True,),
    "attention_mode": ("gqa", "mha"),
    "attention_sink_bias": (False,),
    "attention_value_scale": (),
    "projector_type": ("dflash",),
    "pure_draft_prefix_len": (0,),
    "shift_label": (False,),
    "conv_kernel_size": (0,),
    "conv_group_size": (0,),
    "selector_rank": (0,),
    "selector_top_k": (0,),
    "has_embed_tokens": (False,),
    "has_lm_head": (False,),
}
"""Keys with which other drafts compute something else, and what they may be here."""


def save_network(
    network: Backbone,
    config: Mapping[str, Any],
    path: Path,
    *,
    dtype: torch.dtype,
    files: Mapping[str, bytes] | None = None,
    embedding: torch.Tensor | None = None,
) -> None:
    """Write a draft to the directory `path`, its weights in `dtype`; `files` (tokenizer and the like) go beside them.

    config: its config.json. embedding: what it reads for each token [V, H], for readers that would take the target's
    bare rows otherwise. Raises CheckpointError when it cannot be written.
    """
    weights = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    if embedding is not None:
        weights["embed_tokens.weight"] = embedding.to(dtype)
    write_draft(path, dict(config), weights, files or {})


def draft_config(form: Form, shape: BlockShape, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a draft, with the keys that published checkpoints have."""
    sliding = "sliding_attention" in shape.layer_types
    config: dict[str, Any] = {
        "architectures": [form.architectures[0]],
        "attention_bias": shape.attention_bias,
        "attention_dropout": 0.0,
        "block_size": shape.block_size,
        "dflash_config": {"mask_token_id": shape.mask_token_id, "target_layer_ids": list(shape.taps)},
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "layer_types": list(shape.layer_types),
        "max_position_embeddings": shape.max_position_embeddings,
        "max_window_layers": shape.num_layers,
        "model_type": "qwen3",
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "num_target_layers": shape.num_target_layers,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": shape.rope_scaling,
        "rope_theta": shape.rope_theta,
        "sliding_window": shape.sliding_window if sliding else None,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "use_cache": True,
        "use_sliding_window": sliding,
        "vocab_size": shape.vocab_size,
    }
    if shape.input_embedding_scale != 1.0:
        config["dflash_config"]["input_embedding_scale"] = shape.input_embedding_scale
    if shape.output_multiplier != 1.0:
        # The first is z-lab's and SGLang's name, the second vLLM's.
        config["dflash_config"]["output_multiplier"] = config["logit_scale"] = shape.output_multiplier
    if shape.final_logit_softcapping:
        config["dflash_config"]["final_logit_softcapping"] = shape.final_logit_softcapping
    if shape.is_causal is not None:
        # Without it readers take sliding layers for causal ones, and full ones for others.
        config["is_causal"] = shape.is_causal
    return config


def serving_notes(shape: BlockShape) -> list[str]:
    """What a person who serves such a draft has to know, for its README."""
    notes = ["Give vLLM the method: it takes it from the path otherwise."]
    if shape.input_embedding_scale != 1.0:
        notes.append(
            f"Its embed_tokens.weight is the target's embedding times {shape.input_embedding_scale:g}, as the target "
            f"itself reads it, because vLLM gives a draft without one the bare rows."
        )
    if "sliding_attention" in shape.layer_types:
        if shape.is_causal is not None:
            notes.append("SGLang from 0.5.18 on: older ones ignore is_causal, and guess worse without an error.")
        if "full_attention" in shape.layer_types:
            notes.append("Some layers slide and some do not: vLLM needs its V2 model runner for that.")
    return notes


def load_network(form: Form, path: str | Path) -> Backbone:
    """The draft of that form in the directory `path`, with float32 weights on the CPU.

    Raises ConfigError when its config.json describes something this draft does not compute, CheckpointError when a
    file is missing, unreadable, or its tensors are not the ones the config asks for.
    """
    path = Path(path)
    network = form.network(read_shape(form, read_config(path), str(path)))
    fill(network, read_weights(path, {"model.": ""}, SURPLUS), str(path))
    return network


def read_shape(form: Form, config: dict[str, Any], where: str) -> BlockShape:
    """The shape in a draft's config.json. `where` names it in errors. Raises ConfigError, see load_network.

    Keys stand inside `dflash_config` or at the top, and in Speculators' form of their own.
    """
    check_architecture(config, where, form.architectures)
    config = flat(unwrapped(config, form.kind, where), "dflash_config")
    only = ONLY | {"target_hidden_size": (config.get("hidden_size"),), "draft_vocab_size": (config.get("vocab_size"),)}
    only = {key: values for key, values in (only | dict(form.only)).items() if key not in form.own}
    check(config, where, read=READ | set(form.own), only=only)
    with reading(where):
        taps = config.get("target_layer_ids")
        if taps is None:
            taps = spread_taps(config["num_target_layers"], config["num_hidden_layers"])
        layer_types = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
        data = {
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "num_kv_heads": config["num_key_value_heads"],
            "head_dim": config.get("head_dim", 128),
            "intermediate_size": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
            "rope_theta": rope_theta(config),
            "rope_scaling": rope_scaling(config, where),
            "max_position_embeddings": config["max_position_embeddings"],
            "block_size": config.get("block_size", 16),
            "mask_token_id": config["mask_token_id"],
            "taps": taps,
            "num_target_layers": config.get("num_target_layers") or max(taps) + 2,
            "layer_types": layer_types,
            "sliding_window": config.get("sliding_window", 0) if "sliding_attention" in layer_types else 0,
            "is_causal": config.get("is_causal", config.get("causal")),
            "attention_bias": config.get("attention_bias", False),
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
            "input_embedding_scale": config.get("input_embedding_scale", 1.0),
            "output_multiplier": config.get("output_multiplier", config.get("logit_scale", 1.0)),
            "final_logit_softcapping": config.get("final_logit_softcapping", 0.0),
        }
        shape = msgspec.convert(data | {key: config[key] for key in form.own}, form.shape)
    if reason := shape.problem():
        raise ConfigError(f"draft {where!r}: {reason}")
    return shape
