"""Layers that drafts share, held against transformers' own."""

from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as llama

from specd.drafts.layers import MLP, RMSNorm, draw, rope_theta, rotate, rotations


def test_rotations_are_those_of_llama() -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_theta=5000.0)
    x, positions = torch.randn(7, 4, 16), torch.tensor([0, 1, 2, 0, 1, 900, 4000])
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, positions[None])
    wanted, _ = llama.apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    found = rotate(x, rotations(positions, 5000.0, 16, torch.float32))
    torch.testing.assert_close(found, wanted[0].transpose(0, 1))


def test_norm_and_mlp_are_those_of_llama() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    norm, mlp = RMSNorm(32, 1e-5), MLP(32, 48)
    draw(mlp, seed=1)
    theirs = llama.LlamaMLP(config)
    theirs.load_state_dict(mlp.state_dict())
    x = torch.randn(5, 32)
    torch.testing.assert_close(mlp(x), theirs(x))
    torch.testing.assert_close(norm(x), llama.LlamaRMSNorm(32, 1e-5)(x))
    assert mlp(x.bfloat16()).dtype == torch.bfloat16


def test_weights_are_drawn_by_their_seed_alone() -> None:
    drawn = []
    for around, seed in ((0, 3), (1, 3), (1, 4)):
        torch.manual_seed(around)
        mlp = MLP(32, 48)
        draw(mlp, seed)
        drawn.append(mlp.up_proj.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert 0.015 < float(drawn[0].detach().std()) < 0.025


def test_the_base_frequency_of_either_form() -> None:
    assert rope_theta({"rope_theta": 5.0}) == 5.0
    assert rope_theta({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 5.0}) == 7.0
    assert rope_theta({}) == 10000.0
