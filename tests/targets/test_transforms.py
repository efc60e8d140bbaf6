"""What is measured of a target's embedding and logits is what its own class computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from specd.config.settings import TargetConfig
from specd.drafts.logits import LogitTransform
from specd.targets.registry import load_target
from specd.targets.transforms import Transforms, measured, named

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip
ROOT = 32**0.5
FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}


def make(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    try:
        config = transformers.AutoConfig.for_model(family, **{**SIZES, **options})
    except ValueError:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    factory: Any = transformers.AutoModelForCausalLM
    model = factory.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "options", "figures"),
    [
        ("llama", {}, (1, 1, 0)),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, (1, 1, 0)),
        ("granite", {"logits_scaling": 5.0, "embedding_multiplier": 12.0}, (1, 1 / 5, 0)),
        ("granitemoe", {"logits_scaling": 3.0}, (1, 1 / 3, 0)),
        ("hyperclovax", {"logits_scaling": 3.0}, (1, 3, 0)),
        ("minicpm3", {"scale_emb": 12, "dim_model_base": 8}, (12, 1 / 4, 0)),
        ("cohere", {"logit_scale": 0.0625}, (1, 0.0625, 0)),
        ("cohere2", {"logit_scale": 0.25}, (1, 0.25, 0)),
        ("gemma", {}, (ROOT, 1, 0)),
        ("gemma2", {"final_logit_softcapping": 30.0}, (ROOT, 1, 30)),
        ("gemma3_text", {"final_logit_softcapping": 1.5}, (ROOT, 1, 1.5)),
        ("gemma3_text", {"hidden_size": 40}, (40**0.5, 1, 0)),
        ("recurrent_gemma", {"lru_width": 32, "logits_soft_cap": 7.0}, (1, 1, 7)),
        ("falcon_h1", {"lm_head_multiplier": 0.3, "embedding_multiplier": 5.0, **FALCON}, (1, 0.3, 0)),
    ],
)
def test_families_are_measured_exactly(
    family: str, options: dict[str, Any], figures: tuple[float, float, float], dtype: torch.dtype
) -> None:
    found = measured(model := make(family, dtype, **options))
    scale, logit_scale, softcap = figures
    assert found == Transforms(embedding_scale=scale, logit_scale=logit_scale, logit_softcap=softcap)
    if dtype != torch.float32 or family in ("minicpm3", "recurrent_gemma"):
        return  # these two run only in shapes that are larger, or with caches
    final: list[torch.Tensor] = []
    model.get_decoder().register_forward_hook(lambda *args: final.append(args[2].last_hidden_state[0]))
    with torch.no_grad():
        wanted = model(torch.arange(1, 9)[None]).logits[0]
        products = final[0] @ model.lm_head.weight.T
    torch.testing.assert_close(LogitTransform(logit_scale, softcap)(products), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_no_such_function_is_said_in_words() -> None:
    model = make("phi")
    assert measured(model) == Transforms(), "its bias is zero, as it was made"
    with torch.no_grad():
        model.lm_head.bias[5] = 0.75
    assert measured(model) == Transforms(odd_logits="its lm_head has a bias (up to 0.75), which trainers do not get")

    model = make("llama")
    model.lm_head.register_forward_hook(lambda *args: args[2].relu())
    assert "its logits are no multiple of the products with lm_head" in measured(model).odd_logits
    model = make("llama")
    model.lm_head.register_forward_hook(lambda *args: args[2] / (1 + args[2].abs() / 2000))
    assert "bent otherwise than by a soft-cap" in measured(model).odd_logits
    model = make("llama")
    model.lm_head.register_forward_hook(lambda *args: args[2][..., :-1])
    assert measured(model).odd_logits == "its logits are [4, 63], expected [4, 64]"
    model = make("llama")
    model.lm_head.register_forward_hook(lambda *_: [][0])
    assert measured(model).odd_logits == "its logits could not be measured (list index out of range)"
    assert model.get_decoder()(torch.arange(3)[None]).last_hidden_state.isfinite().all(), "its decoder is back"

    model = make("llama")
    model.get_input_embeddings().register_forward_hook(lambda *args: args[2] + 1)
    assert "no multiple of its rows" in measured(model).odd_embedding
    model = make("llama")
    model.get_input_embeddings().register_forward_hook(lambda *args: args[2][:, :4])
    assert measured(model).odd_embedding == "its embedding gives torch.Size([64, 4]), not a row a token"
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert measured(model).odd_logits == "its lm_head is all zero, or not finite"


def test_a_figure_that_no_config_names_is_taken_as_measured() -> None:
    model = make("llama")
    model.get_input_embeddings().register_forward_hook(lambda *args: args[2] * 3.7)
    model.lm_head.register_forward_hook(lambda *args: torch.tanh(args[2] * 0.37 / 13.7) * 13.7)
    found = measured(model)
    assert found.embedding_scale == pytest.approx(3.7, rel=1e-4)
    assert (found.logit_scale, found.logit_softcap) == pytest.approx((0.37, 13.7), rel=1e-3)
    assert named(50.5, torch.bfloat16, {"hidden_size": 2560, "deep": True}) == 2560**0.5, "as bfloat16 rounds it"
    assert named(50.5, torch.float32, {"hidden_size": 2560}) == 50.5


def test_they_are_in_a_target_s_contract(tmp_path: Path) -> None:
    make("gemma3_text", final_logit_softcapping=11.0).save_pretrained(tmp_path)
    target = load_target(TargetConfig(model=f"{tmp_path}/", device="cpu"))
    contract = target.contract
    assert (contract.embedding_scale, contract.logit_scale, contract.logit_softcap) == (ROOT, 1.0, 11.0)
    assert contract.odd_embedding == contract.odd_logits == ""
    target.close()
