"""What backends share: which targets carry a state from token to token."""

from __future__ import annotations

from typing import Any

import pytest

from specd.targets.base import recurrent


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({}, ""),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5}, ""),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layers of kind linear_attention"),
        ({"text_config": {"layer_types": ["linear_attention"]}}, "layers of kind linear_attention"),
        ({"layer_types": ["conv", "full_attention"]}, "layers of kind conv"),
        ({"layer_types": ["mamba", "attention", "mlp"], "mamba_d_state": 16}, "layers of kind mamba"),
        ({"layer_types": ["attention", "attention"], "mamba_d_state": 16}, ""),
        ({"block_types": ["recurrent", "recurrent", "attention"]}, "layers of kind recurrent"),
        ({"full_attention_interval": 4, "linear_num_key_heads": 16}, "full_attention_interval in its config.json"),
        ({"mamba_d_ssm": 64}, "mamba_d_ssm in its config.json"),
        ({"hybrid_override_pattern": "M-M*"}, "hybrid_override_pattern in its config.json"),
        ({"attn_type_list": [0, 0, 1]}, "attn_type_list in its config.json"),
        ({"attn_type_list": [1, 1, 1]}, ""),
        ({"mamba_d_ssm": None, "kv_lora_rank": 512, "first_k_dense_replace": 3}, ""),
    ],
)
def test_recurrent_layers_are_seen_in_a_config(config: dict[str, Any], why: str) -> None:
    assert recurrent(config) == why
