"""The network of block drafts: Qwen3-style layers over blocks of masked tokens that attend to projected target states.

Shape legend: T context tokens, N block tokens, n taps, H hidden size, D head size, Q query heads, K key-value heads.
Module names are those of published checkpoints (arXiv 2602.06036), so state dicts travel both ways.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from specd.drafts.backbone.shape import BlockShape, LayerType
from specd.drafts.compile import compiled
from specd.drafts.flex import INSTEAD
from specd.drafts.layers import MLP, Attend, KeyValue, Linear, RMSNorm, Rope, Rotations, draw, rotate


class Attention(nn.Module):
    """Queries from the block, keys and values from the context features and the block."""

    def __init__(self, shape: BlockShape, layer_type: LayerType) -> None:
        super().__init__()
        size, bias, self.head_dim = shape.hidden_size, shape.attention_bias, shape.head_dim
        self.q_proj = Linear(size, shape.num_heads * shape.head_dim, bias)
        self.k_proj = Linear(size, shape.num_kv_heads * shape.head_dim, bias)
        self.v_proj = Linear(size, shape.num_kv_heads * shape.head_dim, bias)
        self.o_proj = Linear(shape.num_heads * shape.head_dim, size, bias)
        self.q_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.rms_norm_eps)
        self.window, self.causal = shape.window(layer_type), shape.causal(layer_type)

    def keys_values(self, x: Tensor, rope: Rope) -> KeyValue:
        """x [tokens, H] -> rotated keys and values."""
        keys = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        return rotate(keys, rope), self.v_proj(x).unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor, rope: Rope) -> Tensor:
        """x [tokens, H] -> rotated queries [tokens, Q, D]."""
        return rotate(self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim))), rope)


class Layer(nn.Module):
    """Pre-norm decoder layer, in two halves with the attention between them."""

    def __init__(self, shape: BlockShape, layer_type: LayerType) -> None:
        super().__init__()
        self.self_attn = Attention(shape, layer_type)
        self.mlp = MLP(shape.hidden_size, shape.intermediate_size)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def enter(self, x: Tensor, rope: Rope) -> tuple[Any, ...]:
        """Residual stream [N, H] -> queries, and keys and values, of its tokens, and what else `leave` takes."""
        x = self.input_layernorm(x)
        return self.self_attn.queries(x, rope), self.self_attn.keys_values(x, rope)

    def leave(self, x: Tensor, attended: Tensor) -> Tensor:
        """Residual stream [N, H] and what attention gave [N, Q·D] -> residual stream after the layer."""
        x = x + self.self_attn.o_proj(attended)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Backbone(nn.Module):
    """The trainable draft, float32 weights drawn from normal(0, 0.02) by `seed` alone.

    It computes in the dtype of the block embeddings it is given. Embedding and lm_head are the target's: they are
    inputs and outputs of this module, never part of it. `compiled`: everything but the attention runs through
    torch.compile, for any number of tokens; off at first. A draft with more parts makes them behind these, whose
    weights are then the same for the same seed. layer: what its layers are.
    """

    layer: ClassVar[type[Layer]] = Layer

    def __init__(self, shape: BlockShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.compiled = False
        self.fc = Linear(len(shape.taps) * shape.hidden_size, shape.hidden_size)
        self.hidden_norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.layers = nn.ModuleList(self.layer(shape, kind) for kind in shape.layer_types)
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.rotary_emb = Rotations(
            shape.rope_theta, shape.rope_scaling, shape.head_dim, shape.num_heads, shape.max_position_embeddings
        )
        draw(self, seed)

    def context(self, taps: Tensor, positions: Tensor) -> list[KeyValue]:
        """What every layer attends to of the context: taps [T, n·H] and positions [T] -> keys and values a layer."""
        project = compiled(Backbone._project, INSTEAD) if self.compiled else Backbone._project
        return project(self, taps, self.rotary_emb(positions, taps.dtype))

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows of the target's embedding as block embeddings."""
        scale = self.shape.input_embedding_scale
        return rows if scale == 1.0 else rows * scale

    def block(self, noise: Tensor, positions: Tensor, context: list[KeyValue], attend: Attend) -> Tensor:
        """Block embeddings [N, H] and positions [N] -> states [N, H] that lm_head reads."""
        enter, leave = self.layer.enter, self.layer.leave
        if self.compiled:
            enter, leave = compiled(enter, INSTEAD), compiled(leave, INSTEAD)
        rope: Rope = self.rotary_emb(positions, noise.dtype)
        for index, keys_values in enumerate(context):
            layer = self._layer(index)
            query, own, *kept = enter(layer, noise, rope)
            window, causal = layer.self_attn.window, layer.self_attn.causal
            noise = leave(layer, noise, attend(query, own, keys_values, window, causal).flatten(1), *kept)
        states: Tensor = self.norm(noise)
        return states

    def forward(
        self, taps: Tensor, context_positions: Tensor, noise: Tensor, block_positions: Tensor, attend: Attend
    ) -> Tensor:
        """States [N, H] of all blocks of a packed batch. Positions count from the start of each sequence."""
        context = self.context(taps.to(noise.dtype), context_positions)
        return self.block(noise, block_positions, context, attend)

    def _project(self, taps: Tensor, rope: Rope) -> list[KeyValue]:
        features = self.hidden_norm(self.fc(taps))
        return [self._layer(index).self_attn.keys_values(features, rope) for index in range(self.shape.num_layers)]

    def _layer(self, index: int) -> Layer:
        layer = self.layers[index]
        assert isinstance(layer, Layer)
        return layer
