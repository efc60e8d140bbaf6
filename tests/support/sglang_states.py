"""How far SGLang's states are from transformers' on a small random checkpoint; a program: SGLang fills a process.

    python tests/support/sglang_states.py FAMILY CHECKPOINT DEVICE TP

prints one JSON line. The checkpoint is made there unless it exists. On a GPU the shapes are those of Qwen3-30B-A3B's
attention, for which SGLang's kernels are compiled ahead of time in many an installation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from specd.config.settings import TargetConfig
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob, Target
from specd.targets.registry import load_target

LENGTHS = (7, 1, 23, 16)
TAPS = (0, 2, 3)
EXPERTS: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 4, "tie_word_embeddings": False}
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
SHARED = EXPERTS | DELTA | {"shared_expert_intermediate_size": 48}
SINKS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "swiglu_limit": 7.0,
}
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "qwen3_moe": EXPERTS,
    "gemma3_text": {
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "query_pre_attn_scalar": 16,
        "tie_word_embeddings": True,
    },
    "glm4_moe": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gpt_oss": SINKS,
    "qwen3_5_text": DELTA | {"tie_word_embeddings": False},
    "qwen3_5_moe_text": SHARED,
    "qwen3_5": DELTA | {"tie_word_embeddings": False},
    "qwen3_5_moe": SHARED,
    "qwen3_next": SHARED,
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
}
WRAPPED = ("qwen3_5", "qwen3_5_moe")
"""Wrappers for images, which sglang_images.py sends."""
TRITON = ("gpt_oss",)
"""Families that need SGLang's Triton attention, on the CPU by TRITON_INTERPRET=1."""
NAMES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
SHAPES = {"cpu": (64, 96, 4, 2, 16), "cuda": (2048, 1024, 32, 4, 128)}
MOE_SIZE = {"cpu": 48, "cuda": 256}


def checkpoint(family: str, path: Path, kind: str) -> None:
    """A random model whose layers all change the residual stream by about its own size, and remember many tokens."""
    shape = dict(zip(NAMES, SHAPES[kind], strict=True)) | {
        "num_hidden_layers": 6,
        "vocab_size": 1024,
        "max_position_embeddings": 256,
        "moe_intermediate_size": MOE_SIZE[kind],
    }
    if kind == "cuda" and "linear_key_head_dim" in EXTRA[family]:
        shape |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    if not any("experts" in key for key in EXTRA[family]) or family == "gpt_oss":
        del shape["moe_intermediate_size"]
    config = transformers.AutoConfig.for_model(family, **settings(family, EXTRA[family] | shape))
    factory: Any = transformers.AutoModelForCausalLM
    if hasattr(config, "vision_config"):
        factory = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    with torch.device(kind):
        model = factory.from_config(config, dtype=torch.float32 if kind == "cpu" else torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.fill_(-2)
            elif weight.ndim > 1 and "conv" not in name:
                weight.normal_(0, 1.2 * shape["hidden_size"] ** -0.5)
    model.save_pretrained(path)
    published = json.loads((path / "config.json").read_text())
    text = published.get("text_config") or published
    if "linear_attention" in (text.get("layer_types") or ()):
        text["full_attention_interval"] = 3  # published ones have it, and SGLang reads it
        published.get("vision_config", {})["deepstack_visual_indexes"] = []
        (path / "config.json").write_text(json.dumps(published))


def settings(family: str, text: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration: the language model's, or inside a wrapper for images."""
    if family not in WRAPPED:
        return text
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_interleaved": True}
    pairs = text["head_dim"] // 8
    rope["mrope_section"] = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "depth": 1, "out_hidden_size": text["hidden_size"],
        "patch_size": 4, "num_position_embeddings": 16,
    }  # fmt: skip
    tokens = {
        f"{name}_token_id": text["vocab_size"] - last
        for last, name in enumerate(("image", "video", "vision_start", "vision_end"), start=1)
    }
    return {"text_config": text | {"rope_parameters": rope}, "vision_config": vision, **tokens}


def fills(target: Target, groups: tuple[tuple[int, ...], ...], spec: CaptureSpec) -> list[CaptureJob]:
    """One fill of each group of lengths, its tokens drawn from the group's place."""
    made = []
    for seed, lengths in enumerate(groups):
        size = sum(lengths)
        tokens = np.random.default_rng(seed).integers(0, target.contract.vocab_size, size, dtype=np.int32)
        layout = slot_layout(spec, target.contract.hidden_size, size)
        slot: Any = torch.full((layout.nbytes,), 0xA5, dtype=torch.uint8, device=target.device)
        if target.device == "cpu":
            slot = memoryview(slot.numpy())
        made.append(CaptureJob(tokens=tokens, lengths=np.array(lengths, np.int32), spec=spec, layout=layout, slot=slot))
    return made


def run(target: Target, groups: tuple[tuple[int, ...], ...], spec: CaptureSpec, merged: bool) -> list[Any]:
    """The bytes of every slot, filled by one forward or by one each."""
    made = fills(target, groups, spec)
    for part in [made] if merged else [[fill] for fill in made]:
        completion = target.run(part)
        if completion is not None:
            completion.wait()
    return [torch.as_tensor(np.asarray(fill.slot)) if target.device == "cpu" else fill.slot.cpu() for fill in made]


def distance(these: list[Any], those: list[Any], dtype: torch.dtype) -> dict[str, float]:
    """Root mean square of the difference over that of the reference, and the largest difference."""
    a, b = (torch.cat([part.view(dtype).float() for part in parts]) for parts in (these, those))
    rms = float((a - b).square().mean().sqrt() / b.square().mean().sqrt())
    return {"rms": rms, "largest": float((a - b).abs().max())}


def main() -> None:
    family, path, device, tp = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    kind = device.partition(":")[0]
    if not path.is_dir():
        checkpoint(family, path, kind)
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    name: Any = str(dtype).removeprefix("torch.")
    reference = load_target(TargetConfig(model=f"{path}/", backend="transformers", device=device, dtype=name))
    attention = "torch_native" if kind == "cpu" and family not in TRITON else "triton"
    target = load_target(
        TargetConfig(
            model=f"{path}/", backend="sglang", device=device, dtype=name, attention_backend=attention, tp=tp,
            max_forward_tokens=512, memory_fraction=0.5,
        )
    )  # fmt: skip
    found: dict[str, Any] = {"fingerprint": target.contract.fingerprint == reference.contract.fingerprint}
    found["artifacts"] = all(
        bytes(target.artifact(key)) == bytes(reference.artifact(key)) for key in reference.contract.artifacts
    )
    groups = (LENGTHS, (33,), (5, 9))
    for what, spec in (
        ("taps+final", CaptureSpec(taps=TAPS, final=True, dtype=name)),
        ("taps", CaptureSpec(taps=TAPS, dtype=name)),
        ("final", CaptureSpec(taps=(), final=True, dtype=name)),
    ):
        expected = run(reference, groups, spec, merged=False)
        apart = run(target, groups, spec, merged=False)
        found[what] = distance(apart, expected, dtype)
        found[f"{what} merged"] = distance(run(target, groups, spec, merged=True), expected, dtype)
        again = run(target, groups, spec, merged=False)
        found[f"{what} again"] = all(bool(torch.equal(a, b)) for a, b in zip(apart, again, strict=True))
    target.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
