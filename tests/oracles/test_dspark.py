"""DSpark's loss is SpecForge's, and SGLang's and vLLM's own classes read, walk and doubt as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from drafts import VOCAB, make_batch
from dspark import CONFIG, deliver, make_dspark, strong
from peer_dflash import gradients_of
from peer_dspark import of_specforge, specforge_config
from peer_serving import ANCHOR, LENGTH, apart, in_sglang, in_vllm, one_block
from peers import peer
from specd.drafts.dspark.drafter import DSparkDrafter
from specd.drafts.dspark.method import DSparkMethod
from specd.drafts.dspark.network import DSparkDraft
from specd.drafts.dspark.objective import DSpark
from specd.protocol.batch import Batch

BATCHES = [make_batch(lengths, density) for lengths in ((31,), (23, 1, 9, 30)) for density in (1.1, 0.8)]


def made(settings: dict[str, Any], seed: int = 9) -> DSpark:
    return strong(make_dspark(msgspec.structs.replace(CONFIG, **settings)), seed)


@pytest.mark.parametrize("batch", BATCHES, ids=["one", "one with holes", "packed", "packed with holes"])
@pytest.mark.parametrize(
    "settings", [{}, {"loss_decay": 0.0}, {"block_size": 7, "ce_weight": 0.5, "confidence_weight": 0.3}]
)
def test_specforge(batch: Batch, settings: dict[str, Any]) -> None:
    objective, delivery = made(settings), deliver(batch)
    theirs, figures = of_specforge(objective, delivery)
    loss = objective.loss(delivery)
    metrics = {name: float(values.sum()) for name, values in loss.metrics.items()}
    assert metrics["counted"] > 10
    assert (metrics["counted"], metrics["correct"]) == (theirs.counted, theirs.correct)
    assert float(loss.sum.detach()) == pytest.approx(theirs.total, rel=1e-5)
    assert float(loss.weight) == pytest.approx(theirs.weight, rel=1e-5)
    if not objective.decay:  # else its figures have the weights of the loss
        assert metrics["cross_entropy"] / metrics["counted"] == pytest.approx(figures["ce_loss"], rel=1e-5)
        assert 2 - 2 * metrics["accepted"] / metrics["counted"] == pytest.approx(figures["l1_loss"], rel=1e-5)
        error = figures["confidence_abs_error"]
        assert metrics["confidence_error"] / metrics["counted"] == pytest.approx(error, rel=1e-5)
    gradients = gradients_of(objective.module, loss.sum)
    assert gradients.keys() == theirs.gradients.keys()
    for name, gradient in theirs.gradients.items():
        assert float((gradients[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def test_a_directory_of_specforge(tmp_path: Path) -> None:
    objective = made({"sliding_window": 9})
    described = specforge_config(objective)
    model = peer("specforge.modeling.draft.dspark").DSparkDraftModel(transformers.Qwen3Config(**described))
    model.load_state_dict(objective.module.state_dict())
    model.save_pretrained(tmp_path)
    same(objective, tmp_path)


def test_a_directory_of_speculators(tmp_path: Path) -> None:
    objective = made({})
    own = objective.draft.shape
    eager: dict[str, Any] = specforge_config(objective) | {"attn_implementation": "eager"}
    del eager["dflash_config"]
    config = peer("speculators.config")
    algorithm = peer("speculators.proposals.greedy").GreedyTokenProposalConfig()
    settings = peer("speculators.models.dspark.config").DSparkSpeculatorConfig(
        transformer_layer_config=transformers.Qwen3Config(
            **{key: eager[key] for key in eager if key != "dflash_config"}
        ),
        draft_vocab_size=own.vocab_size,
        block_size=own.block_size,
        aux_hidden_state_layer_ids=[tap + 1 for tap in own.taps],
        mask_token_id=own.mask_token_id,
        sliding_window_non_causal=True,
        markov_rank=CONFIG.markov_rank,
        speculators_config=config.SpeculatorsConfig(
            algorithm="dspark",
            proposal_methods=[algorithm],
            default_proposal_method="greedy",
            verifier=config.VerifierConfig(name_or_path=None, architectures=[]),
        ),
    )
    model = peer("speculators.models.dspark.core").DSparkDraftModel(config=settings)
    model.load_state_dict(objective.module.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    same(objective, tmp_path)


def same(objective: DSpark, path: Path) -> None:
    """Read what a peer wrote of the weights of `objective`."""
    found = DSparkMethod.load(path).network
    assert found.shape == msgspec.structs.replace(
        objective.draft.shape, tie_word_embeddings=found.shape.tie_word_embeddings
    )
    assert all(torch.equal(a, b) for a, b in zip(objective.module.parameters(), found.parameters(), strict=True))


def walk(objective: DSpark) -> list[int]:
    """What specd drafts behind the context of `one_block`."""
    drafter = DSparkDrafter(objective.draft, objective.embedding, objective.lm_head)
    drafter.extend(torch.arange(LENGTH), one_block(objective)[0])
    guesses: list[int] = drafter.propose(ANCHOR).tolist()
    return guesses


def confidence(objective: DSpark) -> Tensor:
    """How sure it is of each token of that walk."""
    draft, states = objective.draft, one_block(objective)[2]
    assert isinstance(draft, DSparkDraft)
    before = torch.tensor([ANCHOR, *walk(objective)[:-1]])
    logits: Tensor = draft.confidence_head(states, draft.markov_head.before(before, states.dtype))
    return logits.sigmoid()


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 6}])
@torch.no_grad()
def test_sglang(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    objective, module = made(settings), peer("sglang.srt.models.dspark")
    ragged = peer("sglang.srt.speculative.ragged_verify").RaggedVerifyMode
    monkeypatch.setattr(module, "read_ragged_verify_mode", lambda: next(one for one in ragged if one.name != "STATIC"))
    draft, states = in_sglang(objective, tmp_path / "draft", monkeypatch, "Qwen3DSparkModel", "dspark")
    assert apart(states, one_block(objective)[2]) < 1e-5
    assert (draft.gamma, draft.sample_from_anchor) == (CONFIG.block_size, True)
    before, path = torch.tensor([ANCHOR]), []
    for logits in F.linear(states, objective.lm_head):
        bias, _ = draft.markov_head.step_bias(before, hidden_states=None, state=None)
        before = (logits + bias).argmax(-1)
        path.append(int(before))
    assert path == walk(objective)
    sure, _ = draft.compute_confidence(
        anchor_tokens=torch.tensor([ANCHOR]), draft_tokens=torch.tensor([path]), confidence_features=states
    )
    assert apart(sure[0], confidence(objective)) < 1e-5
    parsed = peer("sglang.srt.speculative.dspark_components.dspark_config").resolve_runtime_config(
        draft_hf_config=transformers.AutoConfig.from_pretrained(tmp_path / "draft"),
        speculative_num_draft_tokens=None,
        target_vocab_size=VOCAB,
    )
    assert (parsed.gamma, parsed.verify_num_draft_tokens, parsed.mask_token_id) == (5, 6, 3)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 6}])
@torch.no_grad()
def test_vllm(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    objective = made(settings)
    name = ("vllm.model_executor.models.qwen3_dspark", "Qwen3DSparkForCausalLM")
    with in_vllm(objective, tmp_path / "draft", monkeypatch, name, "dspark") as (draft, states):
        assert apart(states, one_block(objective)[2]) < 1e-5
        draft.lm_head.weight[:VOCAB] = objective.lm_head
        before, path, sure = torch.tensor([ANCHOR]), [], []
        for state, logits in zip(states, draft.compute_draft_logits(states), strict=True):
            embedded = draft.markov_embed(before)
            sure.append(draft.compute_confidence(state[None], embedded)[0])
            before = (logits + draft.markov_bias(embedded)[0])[:VOCAB].argmax()[None]
            path.append(int(before))
    assert path == walk(objective)
    assert apart(torch.stack(sure), confidence(objective)) < 1e-5
