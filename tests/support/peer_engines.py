"""What the engines' own draft classes need to run here: attention without kernels, one rank without a server."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafts import TARGET, make_batch
from eagle import deliver
from peers import peer
from specd.drafts.eagle3.model import Eagle3Draft
from specd.drafts.eagle3.objective import Eagle3

STEPS = 4
LENGTH = 14
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
BOTH: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"norm_output": True, "fc_norm": True}, {}),
    ({"draft_vocab_size": 0}, {}),
    ({}, {"norm_before_fc": True, "norm_output": True}),
    ({}, {"rope_scaling": LLAMA3}),
    ({}, {"rope_scaling": YARN}),
]
"""Settings, and changes of a shape that they cannot say, which both engines compute."""


class CachedAttention(nn.Module):
    """Attention of rows over all rows so far; queries, keys and values are [rows, heads · D].

    window: rows back that one sees, itself included, 0 for all. causal: none after it.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, window: int = 0, causal: bool = True) -> None:
        super().__init__()
        self.sizes: tuple[int, int, int] = (num_heads, num_kv_heads, head_dim)
        self.window, self.causal = window, causal
        self.keys = self.values = torch.empty(0, num_kv_heads, head_dim)

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Of rows that nobody asks for."""
        self.keys = torch.cat((self.keys, key.view(-1, *self.sizes[1:])))
        self.values = torch.cat((self.values, value.view(-1, *self.sizes[1:])))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        self.keep(key, value)
        num_heads, head_dim = self.sizes[0], self.sizes[2]
        rows, known = query.shape[0], self.keys.shape[0]
        back = torch.arange(known - rows, known)[:, None] - torch.arange(known)
        visible = back >= 0 if self.causal else torch.ones_like(back, dtype=torch.bool)
        if self.window:
            visible &= back < self.window
        found = nn.functional.scaled_dot_product_attention(
            query.view(rows, num_heads, head_dim).transpose(0, 1),
            self.keys.transpose(0, 1),
            self.values.transpose(0, 1),
            attn_mask=visible,
            enable_gqa=True,
        )
        return found.transpose(0, 1).flatten(1)


class Off:
    """Settings that nobody made: whatever is asked for is not there."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Off()

    def __bool__(self) -> bool:
        return False


class OneRank:
    """Of a group of one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return 1 if name.endswith("size") else 0 if name.endswith("rank") else None


def differences(objective: Eagle3, enter: Any, step: Any, head: Tensor) -> list[float]:
    """How far an engine's draft is from specd's, at its first step and at the cached ones after it.

    enter: taps -> states. step: token ids, positions and states -> what lm_head reads and the next states, of a row
    each. Relative to the largest value, of states and of `head`'s logits.
    """
    draft, found = objective.draft, []
    theirs, ours = _steps(enter, step), _steps(draft.enter, functools.partial(_step, objective, _attention(draft)))
    for one, other in zip(theirs, ours, strict=True):
        for value, wanted in ((one, other), (head @ one, draft.lm_head.weight @ other)):
            found.append(float((value - wanted).abs().max() / wanted.abs().max()))
    return found


def _steps(enter: Any, step: Any) -> list[Tensor]:
    """What lm_head reads of one row, at each step."""
    batch = make_batch((LENGTH,))
    taps, tokens, row = deliver(batch).taps, torch.from_numpy(batch.tokens).long(), LENGTH - STEPS - 1
    assert taps is not None
    states, ids, positions, reads = enter(taps[: row + 1].flatten(1)), tokens[1 : row + 2], torch.arange(row + 1), []
    for number in range(STEPS):
        read, states = step(ids, positions, states)
        reads.append(read[-1])
        states, positions = states[-1:], torch.tensor([row + 1 + number])
        ids = tokens[row + 2 + number : row + 3 + number]
    return reads


def _attention(draft: Eagle3Draft) -> CachedAttention:
    return CachedAttention(draft.shape.num_heads, draft.shape.num_kv_heads, draft.shape.head_dim)


def _step(
    objective: Eagle3, attention: CachedAttention, ids: Tensor, positions: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    """Of specd."""
    draft, layer = objective.draft, objective.draft.midlayer
    rope = draft.rope(positions, states.dtype)
    joined = layer.join(nn.functional.embedding(ids, objective.embedding), states)
    key, value = layer.self_attn.keys_values(joined, rope)
    attended = attention(layer.self_attn.queries(joined, rope).flatten(1), key.flatten(1), value.flatten(1))
    following, read = draft.finish(layer.leave(states, attended))
    return read, following


def run_natively(model: Any) -> None:
    """Let the parts of an engine's model run in torch alone."""
    for part in model.modules():
        if hasattr(part, "_forward_method"):
            part._forward_method = part.forward_native
        if hasattr(part, "quant_method"):
            part.cpu_linear = nn.functional.linear
        if hasattr(part, "do_not_compile"):
            part.do_not_compile = True


def as_vllm_reads(path: Path, method: str, guesses: int = 3) -> Any:
    """vLLM's settings for the draft directory `path`, beside a target like that of the tests."""
    target = path.with_name("target")
    target.mkdir()
    described = {**TARGET, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (target / "config.json").write_text(json.dumps(described), encoding="utf-8")
    config = peer("vllm.config")
    return config.SpeculativeConfig(
        model=str(path),
        method=method,
        num_speculative_tokens=guesses,
        target_model_config=config.ModelConfig(model=str(target), skip_tokenizer_init=True, dtype="float32"),
        target_parallel_config=config.ParallelConfig(),
    )


def vllm_config(speculative: Any) -> Any:
    """vLLM's configuration with these speculative settings."""
    config = peer("vllm.config").VllmConfig()
    # Given to its constructor, they would ask for a server's devices and kernels.
    for name, value in (("model_config", speculative.target_model_config), ("speculative_config", speculative)):
        object.__setattr__(config, name, value)
    return config
