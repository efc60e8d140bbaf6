"""The EAGLE-3 draft network: one Llama-style layer over the target's taps and the embeddings of the tokens after them.

Shape legend: T tokens of a batch, R rows of one step, n taps, H hidden size, D head size, Q query heads, K key-value
heads, V target vocabulary, W draft vocabulary. Module names are those of published checkpoints (arXiv 2503.01840).
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from specd.drafts.compile import compiled
from specd.drafts.eagle3.settings import Eagle3Config
from specd.drafts.flex import INSTEAD
from specd.drafts.layers import MLP, KeyValue, Linear, RMSNorm, Rope, Rotations, draw, rotate
from specd.drafts.rope import Scaling, rope_theta
from specd.errors import ConfigError
from specd.protocol.capture import CaptureSpec

MOST_STEPS = 256
"""Guesses in a row, at most."""


class Eagle3Shape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that fixes the draft's tensors and what it computes.

    taps: 0-based target layers, in the order of `fc`'s input; empty where its directory names none, and then
    `eagle3_taps` of whatever target. num_target_layers: 0 where it is not known. draft_vocab_size: vocab_size where it
    guesses all tokens. num_steps: guesses in a row that it was trained for. norm_output, fc_norm: see Eagle3Config.
    norm_before_fc: one norm over all taps joined. norm_before_residual: the layer adds to its normed state.
    attention_bias: queries, keys, values and output have biases.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Scaling | None = None
    max_position_embeddings: int
    taps: tuple[int, ...]
    num_target_layers: int
    num_steps: int = 7
    norm_output: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    attention_bias: bool = False

    @property
    def num_taps(self) -> int:
        """How many layers it reads."""
        return len(self.taps) or 3

    def problem(self) -> str | None:
        """Why no draft of this shape can exist, or None if it can."""
        sizes = (self.hidden_size, self.num_kv_heads, self.intermediate_size, self.draft_vocab_size, self.num_steps)
        if min(sizes) < 1:
            return "sizes and numbers of heads and steps must be positive"
        if self.num_steps > MOST_STEPS:
            return f"num_steps {self.num_steps} exceeds {MOST_STEPS}, more guesses in a row than any engine takes"
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps >= 0):
            return f"rms_norm_eps {self.rms_norm_eps} is no number from 0 on"
        if self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            return f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
        if self.head_dim < 2 or self.head_dim % 2:
            return f"head_dim {self.head_dim} is not a positive even number"
        if self.draft_vocab_size > self.vocab_size:
            return f"draft_vocab_size {self.draft_vocab_size} exceeds the target's vocabulary of {self.vocab_size}"
        if self.fc_norm and self.norm_before_fc:
            return "fc_norm and norm_before_fc are two ways of one norm: expected at most one of them"
        if not self.taps:
            return None
        return CaptureSpec(taps=self.taps).problem(self.num_target_layers or max(self.taps) + 2)


def draft_shape(config: Eagle3Config, target_config: dict[str, Any], taps: tuple[int, ...]) -> Eagle3Shape:
    """The draft that `config` asks for beside the target of `target_config`, the content of its config.json.

    It rotates with the target's base frequency, without its scaling for long contexts. Raises ConfigError for a
    missing key or a shape that cannot be.
    """
    target: dict[str, Any] = target_config.get("text_config") or target_config
    try:
        hidden_size, num_heads = int(target["hidden_size"]), int(target["num_attention_heads"])
        vocab_size = int(target["vocab_size"])
        shape = Eagle3Shape(
            hidden_size=hidden_size,
            num_heads=config.num_heads or num_heads,
            num_kv_heads=config.num_kv_heads or int(target.get("num_key_value_heads") or num_heads),
            head_dim=config.head_dim or int(target.get("head_dim") or hidden_size // num_heads),
            intermediate_size=config.intermediate_size or int(target["intermediate_size"]),
            vocab_size=vocab_size,
            draft_vocab_size=min(config.draft_vocab_size or vocab_size, vocab_size),
            rms_norm_eps=float(target.get("rms_norm_eps", 1e-6)),
            rope_theta=rope_theta(target),
            max_position_embeddings=int(target["max_position_embeddings"]),
            taps=taps,
            num_target_layers=int(target["num_hidden_layers"]),
            num_steps=config.num_steps,
            norm_output=config.norm_output,
            fc_norm=config.fc_norm,
        )
    except KeyError as error:
        raise ConfigError(
            f"the target's config.json has no key {error}: an EAGLE-3 draft takes its shape from it"
        ) from None
    if reason := shape.problem():
        raise ConfigError(f"draft: {reason}")
    return shape


class Attention(nn.Module):
    """Projections of the joined embedding and state."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        bias, self.head_dim = shape.attention_bias, shape.head_dim
        self.q_proj = Linear(2 * shape.hidden_size, shape.num_heads * shape.head_dim, bias)
        self.k_proj = Linear(2 * shape.hidden_size, shape.num_kv_heads * shape.head_dim, bias)
        self.v_proj = Linear(2 * shape.hidden_size, shape.num_kv_heads * shape.head_dim, bias)
        self.o_proj = Linear(shape.num_heads * shape.head_dim, shape.hidden_size, bias)

    def keys_values(self, x: Tensor, rope: Rope) -> KeyValue:
        """x [rows, 2H] -> rotated keys and values."""
        keys = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(keys, rope), self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """x [rows, 2H] -> rotated queries [rows, Q, D]."""
        return rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), rope)


class Layer(nn.Module):
    """The one layer, in two halves with the attention between them. The embedding comes first in what it joins."""

    def __init__(self, shape: Eagle3Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.norm_before_residual = shape.norm_before_residual

    def enter(self, embedded: Tensor, states: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings and states [rows, H] -> what queries are made from [rows, 2H], and keys and values."""
        joined = self.join(embedded, states)
        return joined, *self.self_attn.keys_values(joined, rope)

    def join(self, embedded: Tensor, states: Tensor) -> Tensor:
        """Embeddings and states [rows, H] -> [rows, 2H], what the projections read."""
        return torch.cat((self.input_layernorm(embedded), self.hidden_norm(states)), -1)

    def leave(self, states: Tensor, attended: Tensor) -> Tensor:
        """States [rows, H], not normed, and what attention gave [rows, Q·D] -> states after the layer."""
        if self.norm_before_residual:
            states = self.hidden_norm(states)
        states = states + self.self_attn.o_proj(attended)
        after: Tensor = states + self.mlp(self.post_attention_layernorm(states))
        return after


class Eagle3Draft(nn.Module):
    """The trainable draft, float32 weights drawn from normal(0, 0.02) by `seed` alone.

    It computes in the dtype of the embeddings it is given. The embedding is the target's, the lm_head [W, H] its own.
    vocabulary: the target's ids of the tokens it guesses, int64 [W], ascending; kept as `d2t`, what to add to its own.
    published_embedding: what its directory has beside it [V, H], if anything. `compiled`: the layer but its attention
    runs through torch.compile, for any number of rows; off at first.
    """

    d2t: Tensor
    published_embedding: Tensor | None = None

    def __init__(self, shape: Eagle3Shape, seed: int = 0, vocabulary: Tensor | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.compiled = False
        size, taps = shape.hidden_size, shape.num_taps
        if shape.fc_norm:
            self.fc_norm = nn.ModuleList(RMSNorm(size, shape.rms_norm_eps) for _ in range(taps))
        if shape.norm_before_fc:
            self.input_norm = RMSNorm(taps * size, shape.rms_norm_eps)
        self.fc = Linear(taps * size, size)
        self.midlayer = Layer(shape)
        self.norm = RMSNorm(size, shape.rms_norm_eps)
        self.lm_head = Linear(size, shape.draft_vocab_size)
        self.rope = Rotations(
            shape.rope_theta, shape.rope_scaling, shape.head_dim, shape.num_heads, shape.max_position_embeddings
        )
        own = torch.arange(shape.draft_vocab_size)
        self.register_buffer("d2t", torch.zeros_like(own) if vocabulary is None else vocabulary - own)
        draw(self, seed)

    @property
    def vocabulary(self) -> Tensor:
        """The target's id of each token it guesses, int64 [W]."""
        return self.d2t + torch.arange(self.d2t.shape[0], device=self.d2t.device)

    def suits(self, embedding: Tensor) -> bool:
        """Whether a target's embedding [V, H] is the one that it was trained with, as far as its directory tells."""
        own = self.published_embedding
        return own is None or (
            own.shape == embedding.shape and torch.equal(own.bfloat16(), embedding.detach().cpu().bfloat16())
        )

    def start_head(self, lm_head: Tensor) -> None:
        """Begin with the target's own rows [V, H] of the tokens it guesses: what to say is known, not yet when."""
        with torch.no_grad():
            self.lm_head.weight.copy_(lm_head[self.vocabulary])

    def enter(self, taps: Tensor) -> Tensor:
        """Taps [rows, n·H] -> the states [rows, H] of the first step."""
        if self.shape.fc_norm:
            parts = taps.chunk(self.shape.num_taps, -1)
            taps = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], -1)
        if self.shape.norm_before_fc:
            taps = self.input_norm(taps)
        states: Tensor = self.fc(taps)
        return states

    def finish(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """States [rows, H] after the layer -> those of the next step, and those that lm_head reads."""
        normed: Tensor = self.norm(states)
        return (normed if self.shape.norm_output else states), normed

    def keyed(self, embedded: Tensor, states: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """See Layer.enter."""
        enter = compiled(Layer.enter, INSTEAD) if self.compiled else Layer.enter
        return enter(self.midlayer, embedded, states, rope)

    def queries(self, joined: Tensor, rope: Rope) -> Tensor:
        """What `keyed` joined [rows, 2H] -> queries [rows, Q, D]."""
        queries = compiled(Attention.queries, INSTEAD) if self.compiled else Attention.queries
        return queries(self.midlayer.self_attn, joined, rope)

    def after(self, states: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """States [rows, H] and what attention gave [rows, Q, D] -> as `finish`."""
        leave = compiled(Eagle3Draft._leave, INSTEAD) if self.compiled else Eagle3Draft._leave
        return leave(self, states, attended)

    def _leave(self, states: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        return self.finish(self.midlayer.leave(states, attended.flatten(1)))
