"""SGLang reads a draft's directory as what it is, and its own draft class computes the same."""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from safetensors.torch import load_file

from drafts import CONFIG as DFLASH
from drafts import VOCAB, make_draft
from eagle import CONFIG, make_eagle
from peer_engines import BOTH, CachedAttention, differences, run_natively
from peers import peer

Space = types.SimpleNamespace


pytestmark = pytest.mark.usefixtures("sglang")


def test_a_dflash_directory(tmp_path: Path) -> None:
    objective = make_draft(DFLASH)
    objective.export(tmp_path / "draft")
    parse = peer("sglang.srt.speculative.dflash_utils").parse_dflash_draft_config
    model = peer("sglang.srt.configs.model_config").ModelConfig
    read = model(model_path=str(tmp_path / "draft"), is_draft_model=True, dtype="float32")
    found, shape = parse(draft_hf_config=read.hf_config), objective.draft.shape
    assert read.hf_config.architectures == ["DFlashDraftModel"]
    assert (read.vocab_size, read.head_dim, read.context_len) == (VOCAB, shape.head_dim, 512)
    assert found.resolve_target_layer_ids(target_num_layers=8) == list(shape.taps)
    assert (found.block_size, found.mask_token_id) == (shape.block_size, shape.mask_token_id)
    assert (found.num_hidden_layers, found.num_target_layers) == (shape.num_layers, 8)


def test_an_eagle3_directory_names_its_taps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make_eagle()
    objective.export(tmp_path / "draft")
    module = peer("sglang.srt.model_executor.model_runner_components.spec_aux_hidden_state")
    read = functools.partial(peer("sglang.srt.configs.model_config").ModelConfig, dtype="float32")
    path = Space(speculative_draft_model_path=str(tmp_path / "draft"), speculative_draft_model_revision=None)
    monkeypatch.setattr(
        module, "ModelConfig", Space(from_server_args=lambda _, model_revision, **settings: read(**settings))
    )
    monkeypatch.setattr(module, "get_spec", lambda: path)
    found = module.SpecAuxHiddenStateConfig(is_dspark=False)
    algorithm = Space(is_eagle=lambda: True, is_eagle3=lambda: True, is_standalone=lambda: False)
    module._resolve_eagle_aux_hidden_state(
        config=found, server_args=None, model_config=None, spec_algorithm=algorithm, is_draft_worker=False
    )
    assert found.eagle_use_aux_hidden_state is True
    assert found.eagle_draft_num_layers == 1
    assert found.draft_model_config.hf_config.architectures == ["LlamaForCausalLMEagle3"]
    target = Space(model=Space(), pp_group=Space(is_last_rank=True), config=Space(num_hidden_layers=8))
    peer("sglang.srt.models.llama").LlamaForCausalLM.set_eagle3_layers_to_capture(
        target, found.eagle_aux_hidden_state_layer_ids
    )
    assert target.model.layers_to_capture == [tap + 1 for tap in objective.draft.shape.taps]  # in front of these


@pytest.mark.parametrize(("settings", "others"), BOTH)
def test_its_eagle3_computes_the_same(
    tmp_path: Path, settings: dict[str, Any], others: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = peer("sglang.srt.models.llama_eagle3")
    monkeypatch.setattr(module, "LogitsProcessor", lambda _: torch.nn.Identity())
    objective = make_eagle(msgspec.structs.replace(CONFIG, **settings), shape=others)
    objective.export(tmp_path / "draft")
    shape = objective.draft.shape
    with torch.no_grad():
        draft = module.LlamaForCausalLMEagle3(transformers.AutoConfig.from_pretrained(tmp_path / "draft"))
        for parameter in draft.parameters():
            parameter.fill_(torch.nan)
        draft.load_weights(load_file(tmp_path / "draft/model.safetensors").items())
        draft.model.embed_tokens.weight[:VOCAB] = objective.embedding
        run_natively(draft)
        attention = CachedAttention(shape.num_heads, shape.num_kv_heads, shape.head_dim)
        draft.model.layers[0].self_attn.attn = attention
        plain = Space(is_extend=lambda: False)

        def step(ids: torch.Tensor, positions: torch.Tensor, states: torch.Tensor) -> Any:
            request = Space(mm_input_embeds=None, forward_mode=plain, spec_info=Space(hidden_states=states))
            read, (following,) = draft.model(ids, positions, request)
            return read, following

        found = differences(objective, lambda taps: taps, step, draft.lm_head.weight[: shape.draft_vocab_size])
    assert max(found) < 1e-5
    own = draft.get_hot_token_id()
    assert torch.equal(torch.arange(VOCAB) if own is None else own, objective.draft.vocabulary)
