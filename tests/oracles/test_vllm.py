"""vLLM reads a draft's directory as what it is, and its own draft class computes the same."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from drafts import CONFIG as DFLASH
from drafts import VOCAB, make_draft
from eagle import CONFIG, make_eagle
from peer_engines import CachedAttention, differences
from peers import importable, peer

Space = types.SimpleNamespace


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    meeting = tmp_path_factory.mktemp("vllm") / "meeting"
    with importable():
        state, config = peer("vllm.distributed.parallel_state"), peer("vllm.config")
        state.init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        with config.set_current_vllm_config(config.VllmConfig()):
            state.initialize_model_parallel(1, 1)
        yield
        state.destroy_model_parallel()
        state.destroy_distributed_environment()


def settings_of(path: Path, method: str) -> Any:
    """What vLLM makes of the draft directory `path`, as its speculative settings hold it."""
    read = transformers.AutoConfig.from_pretrained(path)
    config = peer("vllm.transformers_utils.configs.eagle").EAGLEConfig(read, method=method, model_type="eagle")
    held = Space(hf_config=config, model=str(path), revision=None)
    return Space(draft_model_config=held, method=method, num_speculative_tokens=3, parallel_drafting=False)


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
    settings = settings_of(tmp_path / "draft", "dflash")
    config = settings.draft_model_config.hf_config
    assert config.architectures == ["DFlashDraftModel"]
    assert aux_layers(settings) == {tuple(tap + 1 for tap in objective.draft.shape.taps)}
    causal = peer("vllm.model_executor.models.qwen3_dflash")._dflash_layer_causal
    assert [causal(config, layer) for layer in range(2)] == [False, False]


def test_an_eagle3_directory_names_its_taps(tmp_path: Path) -> None:
    objective = make_eagle()
    objective.export(tmp_path / "draft")
    settings = settings_of(tmp_path / "draft", "eagle3")
    assert settings.draft_model_config.hf_config.architectures == ["LlamaForCausalLMEagle3"]
    assert aux_layers(settings) == {tuple(tap + 1 for tap in objective.draft.shape.taps)}


@pytest.mark.parametrize("settings", [{}, {"norm_output": True, "fc_norm": True}, {"draft_vocab_size": 0}])
def test_its_eagle3_computes_the_same(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = make_eagle(msgspec.structs.replace(CONFIG, **settings))
    objective.export(tmp_path / "draft")
    shape, module = objective.draft.shape, peer("vllm.model_executor.models.llama_eagle3")

    class Attention(CachedAttention):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__(shape.num_heads, shape.num_kv_heads, shape.head_dim)

    monkeypatch.setattr(peer("vllm.model_executor.models.llama"), "Attention", Attention)
    monkeypatch.setattr(module, "get_draft_quant_config", lambda _: None)
    speculative = settings_of(tmp_path / "draft", "eagle3")
    target = Space(
        dtype=torch.float32,
        get_total_num_hidden_layers=lambda: shape.num_target_layers,
        get_vocab_size=lambda: VOCAB,
        hf_config=transformers.AutoConfig.from_pretrained(tmp_path / "draft"),
        head_dtype=None,
        is_moe=False,
        enforce_eager=True,
        quantization=None,
        max_model_len=512,
    )
    config = peer("vllm.config").VllmConfig()
    for name, value in (("model_config", target), ("speculative_config", speculative), ("quant_config", None)):
        object.__setattr__(config, name, value)
    with torch.no_grad(), peer("vllm.config").set_current_vllm_config(config):
        draft = module.Eagle3LlamaForCausalLM(vllm_config=config)
        for parameter in draft.parameters():
            parameter.fill_(torch.nan if parameter.is_floating_point() else -1)
        draft.load_weights(load_file(tmp_path / "draft/model.safetensors").items())
        draft.model.embed_tokens.weight[:VOCAB] = objective.embedding
        for part in draft.modules():
            if hasattr(part, "_forward_method"):
                part._forward_method = part.forward_native
            if hasattr(part, "quant_method"):
                part.cpu_linear = nn.functional.linear
            if hasattr(part, "do_not_compile"):
                part.do_not_compile = True
        found = differences(
            objective, draft.combine_hidden_states, draft, draft.lm_head.weight[: shape.draft_vocab_size]
        )
    assert max(found) < 1e-5
    own = draft.draft_id_to_target_id
    ids = torch.arange(VOCAB) if own is None else own + torch.arange(own.shape[0])
    assert torch.equal(ids, objective.draft.vocabulary)


WINDOWS: list[dict[str, Any]] = [
    {},
    {"sliding_window": 6},
    {"sliding_window": 6, "sliding_causal": False},
    {"num_layers": 5, "sliding_window": 6, "full_layers": 1},
]


@pytest.mark.parametrize("windows", WINDOWS)
def test_its_layers_slide_as_the_drafts(tmp_path: Path, windows: dict[str, Any]) -> None:
    objective = make_draft(msgspec.structs.replace(DFLASH, **windows))
    objective.export(tmp_path)
    shape, config = objective.draft.shape, transformers.AutoConfig.from_pretrained(tmp_path)
    module = peer("vllm.model_executor.models.qwen3_dflash")
    # Where some layers slide and some do not, it asks for its newer runner.
    newer = Space(use_v2_model_runner=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_current_vllm_config", lambda: newer)
        layers = [module._resolve_layer_attention(config, layer) for layer in range(shape.num_layers)]
    found = [(window or 0, causal) for window, causal in layers]
    assert found == [(shape.window(kind), shape.causal(kind)) for kind in shape.layer_types]
