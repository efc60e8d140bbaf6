"""vLLM reads a draft's directory as what it is, and its own draft class computes the same."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from drafts import CONFIG as DFLASH
from drafts import VOCAB, make_draft
from eagle import CONFIG, make_eagle
from peer_engines import BOTH, CachedAttention, as_vllm_reads, differences, run_natively, vllm_config
from peers import peer

Space = types.SimpleNamespace


pytestmark = pytest.mark.usefixtures("vllm")


def aux_layers(settings: Any) -> set[tuple[int, ...]]:
    """Layers of the target in front of which both of its runners take states."""
    older = peer("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    newer = peer("vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils")
    return {
        newer.get_eagle3_aux_layers_from_config(settings),
        older._get_eagle3_aux_layers_from_config(Space(speculative_config=settings)),
    }


def test_a_dflash_directory(tmp_path: Path) -> None:
    objective = make_draft(DFLASH)
    objective.export(tmp_path / "draft")
    settings = as_vllm_reads(tmp_path / "draft", "dflash")
    config = settings.draft_model_config.hf_config
    assert config.architectures == ["DFlashDraftModel"]
    assert aux_layers(settings) == {tuple(tap + 1 for tap in objective.draft.shape.taps)}
    causal = peer("vllm.model_executor.models.qwen3_dflash")._dflash_layer_causal
    assert [causal(config, layer) for layer in range(2)] == [False, False]


def test_an_eagle3_directory_names_its_taps(tmp_path: Path) -> None:
    objective = make_eagle()
    objective.export(tmp_path / "draft")
    settings = as_vllm_reads(tmp_path / "draft", "eagle3")
    assert settings.draft_model_config.hf_config.architectures == ["LlamaForCausalLMEagle3"]
    assert aux_layers(settings) == {tuple(tap + 1 for tap in objective.draft.shape.taps)}


@pytest.mark.parametrize(
    ("settings", "others"), [*BOTH, ({}, {"norm_before_residual": True}), ({}, {"attention_bias": True})]
)
def test_its_eagle3_computes_the_same(
    tmp_path: Path, settings: dict[str, Any], others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make_eagle(msgspec.structs.replace(CONFIG, **settings), shape=others)
    objective.export(tmp_path / "draft")
    shape, module = objective.draft.shape, peer("vllm.model_executor.models.llama_eagle3")

    class Attention(CachedAttention):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(shape.num_heads, shape.num_kv_heads, shape.head_dim)

    monkeypatch.setattr(peer("vllm.model_executor.models.llama"), "Attention", Attention)
    monkeypatch.setattr(module, "get_draft_quant_config", lambda _: None)
    speculative = as_vllm_reads(tmp_path / "draft", "eagle3")
    config = vllm_config(speculative)
    with torch.no_grad(), peer("vllm.config").set_current_vllm_config(config):
        draft = module.Eagle3LlamaForCausalLM(vllm_config=config)
        for parameter in draft.parameters():
            parameter.fill_(torch.nan if parameter.is_floating_point() else -1)
        draft.load_weights(load_file(tmp_path / "draft/model.safetensors").items())
        draft.model.embed_tokens.weight[:VOCAB] = objective.embedding
        run_natively(draft)
        found = differences(
            objective, draft.combine_hidden_states, draft, draft.lm_head.weight[: shape.draft_vocab_size]
        )
    assert max(found) < 1e-5
    own = draft.draft_id_to_target_id
    ids = torch.arange(VOCAB) if own is None else own + torch.arange(own.shape[0])
    assert torch.equal(ids, objective.draft.vocabulary)
