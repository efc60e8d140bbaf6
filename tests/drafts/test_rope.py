"""Rotary settings: read as they are published, and rotated as transformers does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama as llama

from specd.drafts.layers import Rotations, rotate
from specd.drafts.rope import rope_scaling, rope_theta
from specd.errors import ConfigError

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "scaling",
    [None, LLAMA3, YARN, YARN | {"beta_fast": 16.0, "attention_factor": 1.5}, {"rope_type": "linear", "factor": 2.0}],
)
def test_rotations_are_those_of_llama(scaling: dict[str, Any] | None) -> None:
    rope = {"rope_theta": 5000.0, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=512, rope_parameters=rope
    )
    x, positions = torch.randn(7, 4, 16), torch.tensor([0, 1, 2, 0, 1, 300, 4000])
    cos, sin = llama.LlamaRotaryEmbedding(config)(x, positions[None])
    wanted, _ = llama.apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    own = Rotations(5000.0, rope_scaling({"rope_parameters": rope}, "here"), 16, 4, 512)
    torch.testing.assert_close(rotate(x, own(positions, torch.float32)), wanted[0].transpose(0, 1))
    assert own.state_dict() == {}


def test_the_base_frequency_of_every_form() -> None:
    assert rope_theta({"rope_theta": 5.0}) == 5.0
    assert rope_theta({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 5.0}) == 7.0
    assert rope_theta({"rope_theta": 5.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}) == 5.0
    assert rope_theta({}) == 10000.0


def test_of_several_rotations_that_of_full_attention_counts() -> None:
    both = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6, "rope_type": "default"}}
    assert rope_theta({"rope_parameters": both}) == 1e6
    assert rope_scaling({"rope_parameters": both}, "here") is None
    with pytest.raises(ConfigError, match="entries for sliding_attention: expected one for full_attention"):
        rope_theta({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}})


@pytest.mark.parametrize("kind", ["default", "mrope", None])
def test_what_changes_nothing_for_text_is_no_scaling(kind: str | None) -> None:
    rope = {"type": kind, "mrope_section": [2, 3, 3], "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    assert rope_scaling({"rope_scaling": rope}, "here") is None
    assert rope_scaling({}, "here") is None


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type is 'longrope', expected default, linear, llama3, yarn"),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.25},
            "type 'default' with partial_rotary_factor: expected none",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "low_freq_factor": 1.0}, "type 'yarn' with factor, low_freq_factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "type 'llama3' with factor: expected factor, high_freq_factor"),
        ([1], "rope_parameters is .1., expected an object"),
        ({"rope_type": "yarn", "factor": "x"}, "factor of its rope_parameters is 'x', expected a positive number"),
        ({"rope_type": "linear", "factor": 0}, "factor of its rope_parameters is 0, expected"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor of its rope_parameters is nan, expected"),
        ({"rope_type": "yarn", "factor": 2, "beta_fast": -1}, "beta_fast of its rope_parameters is -1, expected"),
        ({"rope_type": "yarn", "factor": 2, "truncate": 1}, "truncate of its rope_parameters is 1, expected true or"),
    ],
)
def test_rotations_that_nobody_here_computes_are_refused(rope: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        rope_scaling({"rope_parameters": rope}, "here")


def test_a_scale_of_nothing_is_one() -> None:
    settings = {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0}
    assert rope_scaling({"rope_parameters": settings}, "here") == settings


@pytest.mark.parametrize("theta", ["x", -1.0, float("nan"), float("inf"), True, [5]])
def test_a_frequency_that_is_none_is_refused(theta: Any) -> None:
    for config in ({"rope_theta": theta}, {"rope_parameters": {"rope_theta": theta}}):
        with pytest.raises(ConfigError, match=r"rope_theta is .*, expected a positive number"):
            rope_theta(config)
