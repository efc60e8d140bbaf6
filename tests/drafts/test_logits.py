"""A target's logits from its final states are those of its own class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from specd.drafts.logits import LogitTransform, logit_transform
from specd.errors import ConfigError

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("granite", {"logits_scaling": 5.0}),
        ("granitemoe", {"logits_scaling": 3.0}),
        ("hyperclovax", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("cohere2", {"logit_scale": 0.25}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("gemma3_text", {"final_logit_softcapping": 1.5}),
        ("recurrent_gemma", {"logits_soft_cap": 1.5, "lru_width": 32, "block_types": ["recurrent", "attention"]}),
        ("falcon_h1", {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}),
    ],
)
def test_transformers_computes_the_same(family: str, options: dict[str, Any]) -> None:
    try:
        config = transformers.AutoConfig.for_model(family, **SIZES, **options)
    except ValueError:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM
    model = model.from_config(config, dtype=torch.float32).eval()
    final: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: final.append(inputs[0][0]))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        wanted = model(torch.arange(1, 9)[None]).logits[0]
        found = logit_transform(config.to_dict(), "target")(final[0] @ model.lm_head.weight.T)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_scale_of_an_unknown_family_is_refused() -> None:
    config = {"model_type": "minicpm", "dim_model_base": 256}
    with pytest.raises(ConfigError, match=r"is a .minicpm. with dim_model_base=256 in"):
        logit_transform(config, "target")
    with pytest.raises(ConfigError, match="whose lm_head has a bias"):
        logit_transform({"model_type": "phi"}, "target")
    for family in ({"model_type": "phimoe", "lm_head_bias": True}, {"model_type": "ernie4_5_moe", "use_bias": True}):
        with pytest.raises(ConfigError, match="whose lm_head has a bias"):
            logit_transform(family, "target")
    assert logit_transform({"model_type": "phimoe", "lm_head_bias": False}, "target") == LogitTransform()
    assert logit_transform({"model_type": "glm", "use_bias": True}, "target") == LogitTransform()
    wrapped = {"model_type": "some_vision", "text_config": {"model_type": "granite", "logits_scaling": 4.0}}
    assert logit_transform(wrapped, "target") == LogitTransform(0.25)
    assert logit_transform({"model_type": "llama", "logit_scale": 1.0, "logits_scaling": None}, "target") == (1.0, 0.0)
