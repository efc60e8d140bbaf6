"""Draft directories in the EAGLE-3 format that SGLang and vLLM read: model.safetensors and config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from specd.drafts.eagle3.model import Eagle3Draft, Eagle3Shape
from specd.drafts.files import write_draft
from specd.drafts.layers import rope_theta
from specd.errors import CheckpointError, ConfigError

ARCHITECTURE = "LlamaForCausalLMEagle3"
TAPS = "eagle_aux_hidden_state_layer_ids"


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
        "attention_bias": False,
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
        "norm_before_fc": False,
        "norm_before_residual": False,
        "norm_output": shape.norm_output,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": shape.num_kv_heads,
        "num_steps": shape.num_steps,
        "num_target_layers": shape.num_target_layers,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab_size,
    }


def load_draft(path: str | Path) -> Eagle3Draft:
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
    shape = read_shape(config, str(path))
    weights.pop("t2d", None)
    draft = Eagle3Draft(shape)
    if shape.draft_vocab_size == shape.vocab_size:
        weights.setdefault("d2t", torch.zeros(shape.vocab_size, dtype=torch.int64))
    own = {name: tensor.shape for name, tensor in draft.state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if odd := sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name)):
        name = odd[0]
        raise CheckpointError(
            f"{str(path)!r}: {len(odd)} tensors differ from what its config.json asks for, first {name!r}: found "
            f"{list(found[name]) if name in found else 'none'}, expected {list(own[name]) if name in own else 'none'}"
        )
    draft.load_state_dict(weights)
    ids = draft.vocabulary
    if not (int(ids[0]) >= 0 and int(ids[-1]) < shape.vocab_size and bool((ids[1:] > ids[:-1]).all())):
        raise CheckpointError(f"{str(path)!r}: d2t is no ascending map into a vocabulary of {shape.vocab_size}")
    return draft


def read_shape(config: dict[str, Any], where: str) -> Eagle3Shape:
    """The shape in a draft's config.json. `where` names it in errors. Raises ConfigError, see load_draft."""
    inside = config.get("eagle_config") or {}
    refused = {
        "num_hidden_layers": (config.get("num_hidden_layers") != 1, "expected 1"),
        "model_type": (config.get("model_type") != "llama", "expected 'llama'"),
        "hidden_act": (config.get("hidden_act", "silu") != "silu", "expected 'silu'"),
        "attention_bias": (bool(config.get("attention_bias")), "expected none"),
        "mlp_bias": (bool(config.get("mlp_bias")), "expected none"),
        "norm_before_fc": (bool(config.get("norm_before_fc")), "expected false"),
        "norm_before_residual": (bool(config.get("norm_before_residual")), "expected false"),
        "tie_word_embeddings": (bool(config.get("tie_word_embeddings")), "expected false"),
        "rope_scaling": (_scaled(config.get("rope_scaling")), "expected none"),
        "rope_parameters": (_scaled(config.get("rope_parameters")), "expected rope_type 'default'"),
    }
    for key, (wrong, expectation) in refused.items():
        if wrong:
            raise ConfigError(
                f"draft {where!r}: {key} is {config.get(key)!r}, {expectation}; specd cannot run this draft"
            )
    try:
        taps = inside.get(TAPS) or [tap - 1 for tap in config[TAPS]]
        data = {
            "hidden_size": config["hidden_size"],
            "num_heads": config["num_attention_heads"],
            "num_kv_heads": config["num_key_value_heads"],
            "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            "intermediate_size": config["intermediate_size"],
            "vocab_size": config["vocab_size"],
            "draft_vocab_size": config.get("draft_vocab_size") or config["vocab_size"],
            "rms_norm_eps": config["rms_norm_eps"],
            "rope_theta": rope_theta(config),
            "max_position_embeddings": config["max_position_embeddings"],
            "taps": taps,
            "num_target_layers": config.get("num_target_layers") or max(taps, default=0) + 2,
            "num_steps": config.get("num_steps", 7),
            "norm_output": config.get("norm_output", False),
            "fc_norm": config.get("fc_norm", False),
        }
        shape = msgspec.convert(data, Eagle3Shape)
    except KeyError as error:
        raise ConfigError(f"draft {where!r}: its config.json has no key {error}") from None
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"draft {where!r}: config.json: {error}") from None
    if reason := shape.problem():
        raise ConfigError(f"draft {where!r}: {reason}")
    return shape


def _scaled(rope: dict[str, Any] | None) -> bool:
    """Whether rotary settings ask for more than a base frequency."""
    return rope is not None and (rope.get("rope_type") or rope.get("type") or "default") != "default"
