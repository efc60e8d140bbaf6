"""DFlash2 is z-lab's, its loss AutoModel's, and SGLang's and vLLM's own classes walk as it does."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from dflash2 import CONFIG, make_dflash2, strong
from drafts import VOCAB, deliver, make_batch, taps_of
from peer_serving import ANCHOR, LENGTH, apart, in_sglang, in_vllm, one_block
from peers import peer
from specd.drafts.backbone.drafter import BlockDrafter
from specd.drafts.dflash2.drafter import DFlash2Drafter
from specd.drafts.dflash2.objective import DFlash2
from specd.drafts.dflash2.settings import DFlash2Config

SEEN: list[dict[str, Any]] = [{}, {"sliding_window": 6}, {"conv_kernel_size": 3, "block_size": 8, "selector_top_k": 8}]
SEEDS = range(3)


def made(settings: dict[str, Any], seed: int = 9) -> DFlash2:
    return strong(make_dflash2(msgspec.structs.replace(CONFIG, **settings)), seed)


def walk(objective: DFlash2, kind: type[BlockDrafter] = DFlash2Drafter) -> list[int]:
    """What specd drafts behind the context of `one_block`."""
    drafter = kind(objective.draft, objective.embedding, objective.lm_head)
    drafter.extend(torch.arange(LENGTH), one_block(objective)[0])
    guesses: list[int] = drafter.propose(ANCHOR).tolist()
    return guesses


def test_the_selector_decides_something() -> None:
    with torch.no_grad():
        assert all(walk(objective) != walk(objective, BlockDrafter) for objective in (made({}, seed) for seed in SEEDS))


@pytest.mark.parametrize("settings", SEEN)
@torch.no_grad()
def test_z_lab(tmp_path: Path, settings: dict[str, Any]) -> None:
    from dflash.model import DFlash2DraftModel

    for seed in SEEDS:
        objective = made(settings, seed)
        objective.export(tmp_path / str(seed))
        draft = DFlash2DraftModel.from_pretrained(tmp_path / str(seed), dtype=torch.float32).eval()
        taps, tokens, states = one_block(objective)
        found = draft(
            position_ids=torch.arange(LENGTH + len(tokens))[None],
            noise_embedding=F.embedding(tokens, objective.embedding)[None],
            target_hidden=taps[None],
        )[0]
        assert apart(found, states) < 1e-5
        head = nn.Linear(1, 1, bias=False)
        head.weight = nn.Parameter(objective.lm_head, requires_grad=False)
        assert draft.propose(found[None, 1:], tokens[None, 0], head, 0.0)[0][0].tolist() == walk(objective)


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("settings", SEEN)
@torch.no_grad()
def test_sglang(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module, objective = peer("sglang.srt.models.dflash"), made(settings)
    draft, states = in_sglang(objective, tmp_path / "draft", monkeypatch, "DFlash2DraftModel")
    assert apart(states, one_block(objective)[2]) < 1e-5
    draft.lm_head = types.SimpleNamespace(weight=objective.lm_head, org_vocab_size=VOCAB, quant_method=None)
    monkeypatch.setattr(module, "should_apply_lm_head_quant_method", lambda *_: False)
    candidates, unary = draft.compute_candidates(states[1:])
    scores = draft.candidate_selector.build_lattice(
        candidate_ids=candidates[None],
        unary_logits=unary[None],
        hidden_states=states[None, 1:],
        anchor_token_ids=torch.tensor([ANCHOR]),
    )
    path, _ = draft.candidate_selector.sample_path(
        candidate_ids=candidates[None],
        scores=scores,
        uniforms=torch.rand(1, len(states) - 1),
        temperatures=torch.ones(1),
        greedy_mask=torch.ones(1, dtype=torch.bool),
    )
    assert path[0].tolist() == walk(objective)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("settings", SEEN)
@torch.no_grad()
def test_vllm(tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    objective = made(settings)
    name = ("vllm.model_executor.models.qwen3_dflash2", "DFlash2Qwen3ForCausalLM")
    with in_vllm(objective, tmp_path / "draft", monkeypatch, name, "dflash") as (draft, states):
        assert apart(states, one_block(objective)[2]) < 1e-5
        draft.lm_head.weight[:VOCAB] = objective.lm_head
        candidates, unary = draft.compute_candidates(states[1:])
        scores = draft.model.candidate_selector(
            candidates[None], unary[None], states[None, 1:], torch.tensor([ANCHOR])
        )[0]
        path, place = [], 0
        for offset in range(len(candidates)):
            place = int(scores[offset, place].argmax())
            path.append(int(candidates[offset, place]))
    assert path == walk(objective)


@pytest.mark.parametrize("density", [1.1, 0.8], ids=["whole", "with holes"])
@pytest.mark.parametrize("settings", [{"selector_weight": 0.6}, {"conv_kernel_size": 3, "block_size": 8}])
def test_automodel(settings: dict[str, Any], density: float) -> None:
    """Its selector's term is divided by the weight of the rows that are covered, ours by that of all."""
    objective = made({"loss": "decay", "loss_decay": 4.0, **settings})
    delivery = deliver(make_batch((23, 30), density))
    config = objective.config
    assert isinstance(config, DFlash2Config)
    theirs, gradients, recall, hits = of_automodel(objective, delivery)
    with pytest.MonkeyPatch.context() as patch:
        # Both terms alone, each over its own divisor.
        patch.setattr(objective, "config", msgspec.structs.replace(config, selector_weight=0.0))
        unary = objective.loss(delivery)
        patch.setattr(objective, "config", msgspec.structs.replace(config, selector_weight=1.0))
        both = objective.loss(delivery)
    covered = covered_weight(objective, delivery)
    ours = unary.sum / unary.weight + config.selector_weight * (both.sum - unary.sum) / (covered + 1e-6)
    assert float(ours.detach()) == pytest.approx(theirs, rel=1e-5)
    assert float(both.metrics["covered"].sum() / both.metrics["counted"].sum()) == pytest.approx(recall, rel=1e-5)
    assert int(both.metrics["correct"].sum()) == hits
    assert 0 < recall < 1
    ours.backward()  # type: ignore[no-untyped-call]
    for name, parameter in objective.module.named_parameters():
        assert parameter.grad is not None
        assert float((parameter.grad - gradients[name]).norm() / gradients[name].norm()) < 1e-5, name


def covered_weight(objective: DFlash2, delivery: Any) -> Tensor:
    """The weight of the rows whose label is a candidate, by their offset."""
    metrics = objective.loss(delivery).metrics
    offsets = torch.arange(len(metrics["covered"]))
    return (metrics["covered"] * torch.exp(-offsets / objective.decay)).sum()


def of_automodel(objective: DFlash2, delivery: Any) -> tuple[float, dict[str, Tensor], float, int]:
    """Its loss of the same weights and anchors, gradients, recall and hits of the selector; sequences side by side."""
    batch, config, shape = delivery.batch, objective.config, objective.draft.shape
    assert isinstance(config, DFlash2Config)
    described: dict[str, Any] = objective.config_json() | {"attn_implementation": "sdpa"}
    package = "nemo_automodel.components.speculative.dflash"
    draft = peer(f"{package}.draft_qwen3_dflash2").Qwen3DFlash2DraftModel(transformers.Qwen3Config(**described)).eval()
    draft.load_state_dict(objective.module.state_dict())
    embedding, head = nn.Embedding(VOCAB, shape.hidden_size), nn.Linear(shape.hidden_size, VOCAB, bias=False)
    embedding.weight = nn.Parameter(objective.embedding, requires_grad=False)
    head.weight = nn.Parameter(objective.lm_head, requires_grad=False)
    starts = objective.draw(batch).layout
    lengths = batch.lengths.tolist()
    anchors = [torch.from_numpy(starts.anchors - starts.starts)[starts.starts == start] for start in (0, lengths[0])]
    assert [len(one) for one in anchors] == [config.num_anchors] * 2
    model = peer(f"{package}.dflash2_core").DFlash2TrainerModule(
        draft,
        head,
        embedding,
        shape.mask_token_id,
        block_size=shape.block_size,
        attention_backend="sdpa",
        num_anchors=config.num_anchors,
        loss_decay_gamma=objective.decay,
        selector_loss_weight=config.selector_weight,
    )
    model._sample_anchor_positions = lambda *_, **__: (torch.stack(anchors), torch.ones(2, config.num_anchors).bool())
    columns = (torch.from_numpy(batch.tokens).long(), taps_of(delivery).flatten(1), torch.from_numpy(batch.loss_mask))
    tokens, taps, labels = (pad_sequence(list(torch.split(one, lengths)), batch_first=True) for one in columns)
    found = model(tokens, taps, labels.float())
    found.loss.backward()
    gradients = {name: part.grad for name, part in draft.named_parameters() if part.grad is not None}
    return float(found.loss.detach()), gradients, float(found.candidate_recall), int(found.correct_tokens)
