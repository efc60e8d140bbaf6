"""Directories that peers write are the same drafts here: Speculators' and SpecForge's own classes save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers

from dflash2 import CONFIG as DFLASH2
from dflash2 import make_dflash2, strong
from drafts import CONFIG as DRAFT
from drafts import draft_config, make_batch, make_draft
from drafts import load_draft as load_dflash
from eagle import CONFIG, deliver, make_eagle
from peer_eagle import layer_config, of_specd, of_speculators, take
from peers import peer
from specd.drafts import registry
from specd.drafts.dflash2.method import DFlash2Method
from specd.drafts.dflash2.objective import OWN
from specd.drafts.eagle3.export import load_draft as load_eagle3

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SHAPES: list[dict[str, Any]] = [
    {"norm_before_fc": True, "norm_output": True},
    {"norm_before_residual": True, "rope_scaling": LLAMA3},
    {"attention_bias": True, "rope_scaling": YARN},
]
"""What settings cannot ask for, but Speculators' drafts have."""


@pytest.mark.parametrize("shape", SHAPES)
def test_what_only_others_train_computes_the_same(shape: dict[str, Any]) -> None:
    objective, delivery = make_eagle(shape=shape), deliver(make_batch((40,)))
    ours, theirs = of_specd(objective, delivery), of_speculators(objective, delivery)
    assert ours.counted == theirs.counted
    assert abs(ours.total - theirs.total) / abs(theirs.total) < 1e-5
    for name, gradient in theirs.gradients.items():
        assert float((ours.gradients[name] - gradient).norm() / gradient.norm()) < 1e-5, name


@pytest.mark.parametrize(("shape", "size"), [({}, 60), ({}, 0), *((shape, 60) for shape in SHAPES)])
@pytest.mark.parametrize("layers", [None, [2, 4, 5]])
def test_speculators_eagle3(tmp_path: Path, shape: dict[str, Any], size: int, layers: list[int] | None) -> None:
    objective = make_eagle(msgspec.structs.replace(CONFIG, draft_vocab_size=size), shape=shape)
    own = objective.draft.shape
    settings = peer("speculators.models.eagle3").Eagle3SpeculatorConfig(
        transformer_layer_config=layer_config(objective, attn_implementation="eager"),
        draft_vocab_size=own.draft_vocab_size,
        eagle_aux_hidden_state_layer_ids=layers,
        norm_output=own.norm_output,
        norm_before_fc=own.norm_before_fc,
        norm_before_residual=own.norm_before_residual,
    )
    model = peer("speculators.models.eagle3.core").Eagle3DraftModel(config=settings)
    take(model, objective)
    model.save_pretrained(tmp_path)
    found = load_eagle3(tmp_path)
    assert found.shape == msgspec.structs.replace(
        own, taps=(1, 3, 4) if layers else (), num_target_layers=0, num_steps=7
    )
    for name, tensor in objective.draft.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    assert registry.read(tmp_path).drafter(objective.embedding, objective.lm_head, 8).taps == (1, 3, 4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("full", [0, 1])
def test_speculators_dflash(tmp_path: Path, causal: bool, full: int) -> None:
    config = msgspec.structs.replace(DRAFT, sliding_window=9, full_layers=full, sliding_causal=causal)
    objective = make_draft(config)
    own = objective.draft.shape
    layers = draft_config(own, torch.float32)
    eager: dict[str, Any] = {"attn_implementation": "eager"}
    settings = peer("speculators.models.dflash").DFlashSpeculatorConfig(
        transformer_layer_config=transformers.Qwen3Config(**layers, **eager),
        draft_vocab_size=own.vocab_size,
        block_size=own.block_size,
        aux_hidden_state_layer_ids=[tap + 1 for tap in own.taps],
        mask_token_id=own.mask_token_id,
        sliding_window_non_causal=not causal,
        speculators_config=_verifier("dflash"),
    )
    model = peer("speculators.models.dflash").DFlashDraftModel(config=settings)
    model.load_state_dict(objective.module.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    found = load_dflash(tmp_path)
    assert found.shape == msgspec.structs.replace(own, tie_word_embeddings=False)  # which says nothing of the draft
    assert all(torch.equal(a, b) for a, b in zip(objective.module.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize("window", [0, 9])
def test_speculators_dflash2(tmp_path: Path, window: int) -> None:
    objective = strong(make_dflash2(msgspec.structs.replace(DFLASH2, sliding_window=window)))
    own = objective.draft.shape
    eager: dict[str, Any] = draft_config(own, torch.float32) | {"attn_implementation": "eager"}
    settings = peer("speculators.models.dflash2.config").DFlash2SpeculatorConfig(
        transformer_layer_config=transformers.Qwen3Config(**eager),
        draft_vocab_size=own.vocab_size,
        block_size=own.block_size,
        aux_hidden_state_layer_ids=[tap + 1 for tap in own.taps],
        mask_token_id=own.mask_token_id,
        speculators_config=_verifier("dflash2"),
        **{name: getattr(own, name) for name in OWN},
    )
    model = peer("speculators.models.dflash2.core").DFlash2DraftModel(config=settings)
    model.load_state_dict(objective.module.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    found = DFlash2Method.load(tmp_path).network
    assert found.shape == msgspec.structs.replace(own, tie_word_embeddings=False)
    assert all(torch.equal(a, b) for a, b in zip(objective.module.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 9, "num_layers": 3, "full_layers": 1}])
def test_specforge_dflash(tmp_path: Path, settings: dict[str, Any]) -> None:
    objective = make_draft(msgspec.structs.replace(DRAFT, **settings))
    described = draft_config(objective.draft.shape, torch.float32)
    model = peer("specforge.modeling.draft.dflash").DFlashDraftModel(transformers.Qwen3Config(**described))
    model.load_state_dict(objective.module.state_dict())
    model.save_pretrained(tmp_path)
    found = load_dflash(tmp_path)
    assert found.shape == objective.draft.shape
    assert all(torch.equal(a, b) for a, b in zip(objective.module.parameters(), found.parameters(), strict=True))


def test_specforge_eagle3(tmp_path: Path) -> None:
    objective = make_eagle()
    model = peer("specforge.modeling.draft.llama3_eagle").LlamaForCausalLMEagle3(layer_config(objective))
    take(model, objective)
    model.save_pretrained(tmp_path)
    found = load_eagle3(tmp_path)
    assert found.shape == msgspec.structs.replace(objective.draft.shape, taps=(), num_target_layers=0, num_steps=7)
    for name, tensor in objective.draft.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name


def _verifier(algorithm: str) -> Any:
    config, greedy = peer("speculators.config"), peer("speculators.proposals.greedy")
    return config.SpeculatorsConfig(
        algorithm=algorithm,
        proposal_methods=[greedy.GreedyTokenProposalConfig(speculative_tokens=3)],
        default_proposal_method="greedy",
        verifier=config.VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
    )
