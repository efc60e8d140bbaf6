"""Block drafts in the engines' own classes: exported, loaded there, and run on one block."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from drafts import HIDDEN, VOCAB
from peer_engines import CachedAttention, as_vllm_reads, run_natively, vllm_config
from peers import peer
from specd.drafts.backbone.objective import BlockObjective
from specd.drafts.block_attention import BlockLayout, plain_attention

LENGTH, ANCHOR = 13, 5


def one_block(objective: BlockObjective) -> tuple[Tensor, Tensor, Tensor]:
    """Taps of a context; a block behind it; and the states that the draft has for that block."""
    shape = objective.draft.shape
    taps = torch.randn(LENGTH, 3 * HIDDEN, generator=torch.Generator().manual_seed(4))
    tokens = torch.full((shape.block_size,), shape.mask_token_id)
    tokens[0] = ANCHOR
    layout = BlockLayout(
        starts=np.zeros(1, np.int64), anchors=np.array([LENGTH]), block_size=shape.block_size, num_context=LENGTH
    )
    positions = LENGTH + torch.arange(shape.block_size)
    attend = plain_attention(layout, torch.device("cpu"))
    states = objective.draft(taps, torch.arange(LENGTH), F.embedding(tokens, objective.embedding), positions, attend)
    return taps, tokens, states


def apart(found: Tensor, states: Tensor) -> float:
    """The largest difference beside the largest value."""
    return float((found - states).abs().max() / states.abs().max())


def in_sglang(
    objective: BlockObjective, path: Path, patch: pytest.MonkeyPatch, name: str, home: str = "dflash"
) -> tuple[Any, Tensor]:
    """SGLang's draft `name` of its module `home` read from `path`, and its states of `one_block`."""
    objective.export(path)
    taps, tokens, _ = one_block(objective)
    module, shape = peer("sglang.srt.models.dflash"), objective.draft.shape

    def normed(q: Tensor, k: Tensor, q_norm: Any, k_norm: Any, *_: Any, **__: Any) -> list[Tensor]:
        """In place of a kernel."""
        heads = ((q, q_norm), (k, k_norm))
        return [norm.forward_native(x.reshape(-1, shape.head_dim)).view(x.shape) for x, norm in heads]

    patch.setattr(module, "apply_qk_norm", normed)
    draft = getattr(peer(f"sglang.srt.models.{home}"), name)(transformers.AutoConfig.from_pretrained(path))
    for parameter in draft.parameters():
        parameter.fill_(torch.nan)
    draft.load_weights(load_file(path / "model.safetensors").items())
    run_natively(draft)
    features = draft.project_target_hidden(taps)
    for layer in draft.layers:
        attention = layer.self_attn
        # It counts the tokens before the one that looks, and a decoder is causal.
        window, causal = attention.attn.sliding_window_size + 1, attention.attn.attn_type.name == "DECODER"
        key, value = attention.kv_proj_only(features)
        key = attention.apply_k_rope(torch.arange(LENGTH), attention.apply_k_norm(key))
        attention.attn = CachedAttention(shape.num_heads, shape.num_kv_heads, shape.head_dim, window, causal)
        attention.attn.keep(key, value)
    positions = LENGTH + torch.arange(shape.block_size)
    block = draft(tokens, positions, None, input_embeds=F.embedding(tokens, objective.embedding))
    return draft, block.hidden_states


@contextmanager
def in_vllm(
    objective: BlockObjective, path: Path, patch: pytest.MonkeyPatch, name: tuple[str, str], method: str
) -> Iterator[tuple[Any, Tensor]]:
    """vLLM's draft, its module and class, read from `path`, and its states of `one_block`."""
    objective.export(path)
    taps, tokens, _ = one_block(objective)
    module, shape = peer("vllm.model_executor.models.qwen3_dflash"), objective.draft.shape

    class Attention(CachedAttention):
        def __init__(self, *_: Any, prefix: str, per_layer_sliding_window: int | None, **__: Any) -> None:
            sizes = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
            super().__init__(*sizes, per_layer_sliding_window or 0)
            self.layer_name, self.kv_cache = prefix, None
            self.impl = types.SimpleNamespace(do_kv_cache_update=lambda _, key, value, *__: self.keep(key, value))

    config = vllm_config(as_vllm_reads(path, method, shape.num_guesses))
    patch.setattr(module, "Attention", Attention)
    patch.setattr(module, "get_draft_quant_config", lambda _: None)
    patch.setattr(type(config), "use_v2_model_runner", True)  # where layers differ it asks for that runner
    with peer("vllm.config").set_current_vllm_config(config):
        draft = getattr(peer(name[0]), name[1])(vllm_config=config)
        for parameter in draft.parameters():
            parameter.fill_(torch.nan)
        draft.load_weights(load_file(path / "model.safetensors").items())
        run_natively(draft)
        for layer in draft.model.layers:
            layer.self_attn.attn.causal = layer.self_attn.causal
        draft.model.embed_tokens.weight[:VOCAB] = objective.embedding

        def rms_norm(out: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> None:
            """In place of a kernel; a weight is of each first index."""
            weight = weight.view(weight.shape[0], *[1] * (x.dim() - 2), -1) if weight.dim() > 1 else weight
            out.copy_(x * (x.pow(2).mean(-1, keepdim=True) + epsilon).rsqrt() * weight)

        def rotary_embedding(positions: Tensor, key: Tensor, *_: Any) -> None:
            """In place of a kernel, in place."""
            rope = draft.model.layers[0].self_attn.rotary_emb
            key.copy_(rope.forward_native(positions, key.clone(), None)[0])

        patch.setattr(module.ops, "rms_norm", rms_norm)
        patch.setattr(module.ops, "rotary_embedding", rotary_embedding)
        features = draft.combine_hidden_states(taps)
        draft.precompute_and_store_context_kv(features, torch.arange(LENGTH), torch.arange(LENGTH))
        yield draft, draft(tokens, LENGTH + torch.arange(shape.block_size))
