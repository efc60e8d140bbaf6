"""Tiny random models of every causal LM type that the installed transformers has."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from specd.config.settings import TargetConfig
from specd.errors import SpecdError
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob, slot_tensors
from specd.targets.registry import load_target

HIDDEN, LAYERS, VOCAB = 64, 6, 256
_SIZES: tuple[tuple[Any, str], ...] = (
    (HIDDEN,
     "hidden_size d_model n_embd embed_dim dim lru_width encoder_hidden_size hidden_size_per_layer_input "
     "embedding_size attention_hidden_size pronunciation_embed_dim index_topk rwkv_hidden_size"),
    (LAYERS,
     "num_hidden_layers n_layer n_layers decoder_layers encoder_layers num_layers num_decoder_layers "
     "num_encoder_layers"),
    (4,
     "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
     "num_experts num_local_experts n_routed_experts moe_num_experts linear_num_key_heads "
     "linear_num_value_heads linear_num_heads conv_kernel"),
    (2,
     "num_key_value_heads num_kv_heads num_global_key_value_heads num_experts_per_tok moe_k "
     "num_experts_per_token moe_topk depth index_n_heads eos_token_id num_kv_shared_layers"),
    (96,
     "intermediate_size ffn_dim n_inner ffn_hidden_size dense_ffn_hidden_size decoder_ffn_dim "
     "encoder_ffn_dim d_inner dff dense_intermediate_size"),
    (32,
     "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
     "expert_ffn_hidden_size shared_intermediate_size intermediate_size_mlp chunk_size mamba_chunk_size"),
    (VOCAB, "vocab_size vocab_size_per_layer_input bigram_vocab_size"),
    (512, "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length"),
    (1,
     "n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts bos_token_id "
     "num_mem_blocks first_k_dense_replace mamba_n_groups n_groups"),
    (16,
     "head_dim global_head_dim kv_channels d_kv v_head_dim qk_nope_head_dim mamba_d_head mamba_head_dim "
     "linear_key_head_dim linear_value_head_dim dhead linear_head_dim"),
    (8,
     "mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_state ssm_state_size mamba_dt_rank state_size "
     "qk_rope_head_dim rotary_dim laurel_rank"),
    (128, "mamba_d_ssm mamba_intermediate_size"),
    (24, "q_lora_rank kv_lora_rank o_lora_rank index_head_dim"),
    (None, "layer_types"),
    (33, "sliding_window local_window_size attention_window_size window_size attention_window"),
    (False, "use_mamba_kernels use_cache"),
    (0, "pad_token_id"),
    (True, "is_decoder"),
    (40, "attention_chunk_size"),
    (3, "max_window_layers"),
)  # fmt: skip
SIZES: dict[str, Any] = {key: value for value, keys in _SIZES for key in keys.split()}
"""What a configuration is given of the names that it has."""

MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "gemma4_text": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "cohere_compass_text": {"layer_types": None, "sliding_window_pattern": 2},
    "gemma2": {"attn_logit_softcapping": 0.5},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text"), MROPE),
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 3},
    "longrope": {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    }},
    "dynamic": {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
}  # fmt: skip
"""What some types need besides."""
VARIANTS = {"phi3-longrope": ("phi3", "longrope"), "llama-dynamic": ("llama", "dynamic")}
"""Further kinds of a type: its name, and the key of OWN."""
WRAPPERS = {
    "qwen2_vl": {}, "qwen2_5_vl": {}, "qwen3_vl": {}, "qwen3_vl_moe": {}, "glm4v": {},
    "mistral3": {"text_config": "mistral", "vision_config": "pixtral"},
    "llava": {"text_config": "llama", "vision_config": "clip_vision_model"},
    "internvl": {"text_config": "qwen2"},
    "paligemma": {"text_config": "gemma", "vision_config": "siglip_vision_model"},
}  # fmt: skip
"""Types with images whose language model is served, and what their parts are where they take any."""
MOST_WEIGHTS = 60_000_000
"""Larger ones have sizes of their own, which the test leaves alone."""
MOST_ERROR = 1e-4
"""The largest difference of states, relative to the largest state."""
LENGTHS = (7, 150, 40)


def names() -> list[str]:
    """All causal LM types of the installed transformers, variants of some, and wrappers of language models."""
    return sorted({*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS, *WRAPPERS})


def tiny(config_class: Any, extra: dict[str, Any] | None = None) -> Any:
    """A small configuration of a class of transformers."""
    known = {field.name for field in dataclasses.fields(config_class)}
    settings = {key: value for key, value in SIZES.items() if key in known}
    if "qk_rope_head_dim" in known and "head_dim" in settings:
        settings["head_dim"] = settings["qk_rope_head_dim"]
    if "qk_rope_head_dim" in known and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for part, part_class in (getattr(config_class, "sub_configs", None) or {}).items():
        chosen = WRAPPERS.get(getattr(config_class, "model_type", ""), {}).get(part)
        part_class = CONFIG_MAPPING[chosen] if chosen else part_class
        if part in known and dataclasses.is_dataclass(part_class):
            settings[part] = tiny(part_class).to_dict()
    return config_class(**settings | OWN.get(getattr(config_class, "model_type", ""), {}) | (extra or {}))


def make(name: str, folder: Path) -> None:
    """Write a tiny random checkpoint of type `name` to `folder`. Raises what transformers raises where it cannot."""
    kind, extra = VARIANTS.get(name, (name, ""))
    config = tiny(CONFIG_MAPPING[kind], OWN.get(extra))
    factory: Any = transformers.AutoModelForImageTextToText if kind in WRAPPERS else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(weight.numel() for weight in factory.from_config(config).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"{size:,} weights, expected at most {MOST_WEIGHTS:,}")
    torch.manual_seed(0)
    model = factory.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)


def plain(name: str, folder: Path, taps: tuple[int, ...], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """taps and final as transformers has them: a model of its own for each sequence, eager attention, no padding."""
    factory: Any = transformers.AutoModelForImageTextToText if name in WRAPPERS else transformers.AutoModelForCausalLM
    attention = "sdpa" if name == "moshi" else "eager"  # whose eager attention sees later tokens
    found: dict[str, list[torch.Tensor]] = {"taps": [], "final": []}
    for ids in torch.split(tokens, list(LENGTHS)):
        model = factory.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention).eval()
        with torch.no_grad():
            states = model(input_ids=ids[None].long(), output_hidden_states=True, use_cache=False).hidden_states
        found["taps"].append(torch.stack([states[tap + 1][0] for tap in taps], dim=1))
        found["final"].append(states[-1][0])
    return {key: torch.cat(parts) for key, parts in found.items()}


class Outcome(msgspec.Struct, frozen=True):
    """What the transformers backend makes of a type. how: packed, alone, refused, or none (no tiny model of it)."""

    name: str
    how: str
    why: str = ""
    error: float = 0.0


def outcome(name: str, folder: Path) -> Outcome:
    """Serve packed sequences of a tiny `name`, and compare with one sequence at a time."""
    try:
        make(name, folder)
    except Exception as error:  # noqa: BLE001  configurations of transformers raise what they like
        return Outcome(name, "none", f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    try:
        target: Any = load_target(TargetConfig(model=f"{folder}/", device="cpu", dtype="float32"))
    except SpecdError as error:
        return Outcome(name, "refused", str(error).replace(str(folder), name))
    last = target.contract.num_layers - 2
    taps = tuple(sorted({0, last // 2 + 1, last}))
    spec = CaptureSpec(taps=taps, final=True, dtype="float32")
    ids = np.random.default_rng(0).integers(3, min(VOCAB, target.contract.vocab_size), sum(LENGTHS)).astype(np.int32)
    layout = slot_layout(spec, target.contract.hidden_size, ids.size)
    slot = memoryview(bytearray(layout.nbytes))
    job = CaptureJob(tokens=ids, lengths=np.array(LENGTHS, np.int32), spec=spec, layout=layout, slot=slot)
    target.run([job])
    expected = plain(name, folder, taps, torch.from_numpy(ids))
    worst = max(float((slot_tensors(job)[key] - rows).abs().max() / rows.abs().max()) for key, rows in expected.items())
    return Outcome(name, "alone" if target.alone else "packed", target.alone, worst)


SAID = {"packed": "exact", "alone": "exact, one sequence a forward", "refused": "refused"}
"""How the table puts an outcome."""


def row(found: Outcome) -> str:
    """Its row of the table in docs/targets.md."""
    why = found.why.partition(f"target {found.name}: ")[2] or found.why
    return f"| {found.name} | {SAID[found.how]} | {why} |"


def main() -> None:
    """Print the rows of the table in docs/targets.md."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.disable()
    for name in names():
        with tempfile.TemporaryDirectory() as folder:
            found = outcome(name, Path(folder))
        if found.error > MOST_ERROR:
            raise SystemExit(f"{name} is {found.how}, and wrong by {found.error:.1e}")
        if found.how != "none":
            print(row(found), flush=True)


if __name__ == "__main__":
    main()
