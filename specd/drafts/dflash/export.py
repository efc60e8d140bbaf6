"""Draft directories in the published DFlash format: model.safetensors and config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from specd.drafts.dflash.model import DFlashDraft, DraftShape
from specd.drafts.files import write_draft
from specd.drafts.layers import rope_theta
from specd.errors import CheckpointError, ConfigError

ARCHITECTURE = "DFlashDraftModel"


def save_draft(
    draft: DFlashDraft,
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write `draft` to the directory `path`, its weights in `dtype`; `files` (tokenizer and the like) go beside them.

    Raises CheckpointError when it cannot be written.
    """
    weights = {name: tensor.to(dtype) for name, tensor in draft.state_dict().items()}
    write_draft(path, draft_config(draft.shape, dtype), weights, files or {})


def draft_config(shape: DraftShape, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of a draft, with the keys that published checkpoints have."""
    sliding = "sliding_attention" in shape.layer_types
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "attention_bias": False,
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
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": shape.sliding_window if sliding else None,
        "tie_word_embeddings": shape.tie_word_embeddings,
        "use_cache": True,
        "use_sliding_window": sliding,
        "vocab_size": shape.vocab_size,
    }
    if sliding:
        # Readers of the format take sliding layers for causal ones unless told otherwise.
        config["is_causal"] = False
    return config


def load_draft(path: str | Path) -> DFlashDraft:
    """The draft in the directory `path`, with float32 weights on the CPU.

    Raises ConfigError when its config.json describes something this draft does not compute, CheckpointError when a
    file is missing, unreadable, or its tensors are not the ones the config asks for.
    """
    path = Path(path)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        weights = load_file(path / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(path)!r} is no draft directory: {error}; expected config.json and model.safetensors in it"
        ) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"config.json in {str(path)!r} holds a {type(config).__name__}, expected an object")
    draft = DFlashDraft(read_shape(config, str(path)))
    own = {name: tensor.shape for name, tensor in draft.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if own != found:
        odd = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
        name = odd[0]
        raise CheckpointError(
            f"{str(path)!r}: {len(odd)} tensors differ from what its config.json asks for, first {name!r}: "
            f"found {_size(found.get(name))}, expected {_size(own.get(name))}"
        )
    draft.load_state_dict(weights)
    return draft


def _size(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))


def read_shape(config: dict[str, Any], where: str) -> DraftShape:
    """The shape in a draft's config.json. `where` names it in errors. Raises ConfigError, see load_draft."""
    refused = {
        "architectures": (config.get("architectures") != [ARCHITECTURE], f"expected [{ARCHITECTURE!r}]"),
        "model_type": (config.get("model_type") != "qwen3", "expected 'qwen3'"),
        "attention_bias": (bool(config.get("attention_bias")), "expected none"),
        "hidden_act": (config.get("hidden_act", "silu") != "silu", "expected 'silu'"),
        "rope_scaling": (_scaled(config.get("rope_scaling")), "expected none"),
        "rope_parameters": (_scaled(config.get("rope_parameters")), "expected rope_type 'default'"),
    }
    for key, (wrong, expectation) in refused.items():
        if wrong:
            raise ConfigError(
                f"draft {where!r}: {key} is {config.get(key)!r}, {expectation}; specd cannot run this draft"
            )
    inside = config.get("dflash_config") or {}
    try:
        data = {
            "hidden_size": config["hidden_size"],
            "num_layers": config["num_hidden_layers"],
            "num_heads": config["num_attention_heads"],
            "num_kv_heads": config["num_key_value_heads"],
            "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            "intermediate_size": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "rms_norm_eps": config["rms_norm_eps"],
            "rope_theta": rope_theta(config),
            "max_position_embeddings": config["max_position_embeddings"],
            "block_size": config["block_size"],
            "mask_token_id": inside["mask_token_id"],
            "taps": inside["target_layer_ids"],
            "num_target_layers": config["num_target_layers"],
            "layer_types": config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"],
            "sliding_window": config.get("sliding_window") or 0,
            "tie_word_embeddings": config.get("tie_word_embeddings", False),
        }
        shape = msgspec.convert(data, DraftShape)
    except KeyError as error:
        raise ConfigError(f"draft {where!r}: its config.json has no key {error}") from None
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"draft {where!r}: config.json: {error}") from None
    if "sliding_attention" in shape.layer_types and config.get("is_causal") is not False:
        raise ConfigError(f"draft {where!r}: its sliding layers are causal inside a block; expected is_causal false")
    if reason := shape.problem():
        raise ConfigError(f"draft {where!r}: {reason}")
    return shape


def _scaled(rope: dict[str, Any] | None) -> bool:
    """Whether rotary settings ask for more than a base frequency."""
    return rope is not None and (rope.get("rope_type") or rope.get("type") or "default") != "default"
