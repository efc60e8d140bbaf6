"""A DSpark draft as it begins, new or from another draft's weights, and what it writes, reads and guesses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from drafts import CONFIG as DFLASH
from drafts import CONTRACT, HIDDEN, make_draft, parts
from dspark import CONFIG, make_dspark, strong
from specd.drafts.backbone.drafter import BlockDrafter
from specd.drafts.dspark.drafter import DSparkDrafter
from specd.drafts.dspark.method import DSparkMethod
from specd.drafts.dspark.objective import DSpark
from specd.errors import CheckpointError, ConfigError

PLAIN = msgspec.structs.replace(DFLASH, block_size=CONFIG.block_size)


def begin(path: Path, seed: int = 1, **changes: Any) -> DSpark:
    config = msgspec.structs.replace(CONFIG, init=str(path), mask_token_id=-1, **changes)
    DSparkMethod.check(config, "tiny")
    assert DSparkMethod.capture(config, CONTRACT).final
    return DSpark(config, parts(), seed=seed)


def proposals(drafter: BlockDrafter) -> list[list[int]]:
    taps = torch.randn(9, 3 * HIDDEN, generator=torch.Generator().manual_seed(4))
    found = []
    with torch.inference_mode():
        for length in (3, 6, 9):
            drafter.reset()
            drafter.extend(torch.arange(length), taps[:length])
            found.append(drafter.propose(7).tolist())
    return found


def test_it_begins_with_the_guesses_of_its_backbone() -> None:
    plain, fresh = make_draft(PLAIN, seed=4), make_dspark(seed=4)
    weights = fresh.module.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.module.state_dict().items())
    first = weights["markov_head.markov_w1.weight"]
    assert first.std().item() == pytest.approx(0.02, rel=0.2)
    assert not torch.equal(first.flatten(), plain.draft.fc.weight.flatten()[: first.numel()]), "the backbone's numbers"
    others = [name for name in weights if name.startswith(("markov_head.markov_w2", "confidence_head"))]
    assert len(others) == 3
    assert not any(weights[name].any() for name in others)
    target = fresh.embedding, fresh.lm_head
    guesses = proposals(DSparkDrafter(fresh.draft, *target))
    assert guesses == proposals(BlockDrafter(fresh.draft, *target))
    # Of the same states: DFlash's first guess is the second token's, which this draft has for its second one.
    assert [guess[1:] for guess in guesses] == proposals(BlockDrafter(plain.draft, *target))


def test_its_guesses_are_a_walk_by_the_token_before_each() -> None:
    objective = strong(make_dspark())
    head, weights = objective.lm_head, objective.module.state_dict()
    seen: list[torch.Tensor] = []

    class Watched(DSparkDrafter):
        def _guess(self, token: int, states: torch.Tensor) -> torch.Tensor:
            seen.append(states)
            return super()._guess(token, states)

    found = proposals(Watched(objective.draft, objective.embedding, head))
    first, second = (weights[f"markov_head.markov_w{number}.weight"] for number in (1, 2))
    for guesses, states in zip(found, seen, strict=True):
        before = 7
        for guess, state in zip(guesses, states, strict=True):
            before = int((head @ state + second @ first[before]).argmax())
            assert guess == before
    assert found != proposals(BlockDrafter(objective.draft, objective.embedding, head))


def test_a_dflash_becomes_its_backbone(tmp_path: Path) -> None:
    plain = make_draft(PLAIN, seed=4)
    with torch.no_grad():
        for weight in plain.module.parameters():
            weight.add_(0.01)
    plain.export(tmp_path / "draft")
    grown = begin(tmp_path)
    weights, old = grown.module.state_dict(), plain.module.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in old.items())
    fresh = make_dspark(seed=1).module.state_dict()
    assert all(torch.equal(weights[name], fresh[name]) for name in fresh.keys() - old.keys())
    assert (grown.draft.shape.mask_token_id, grown.draft.shape.is_causal) == (3, False)
    assert str(tmp_path / "draft") in grown.facts()["initial weights"]
    # What it began with decodes as that draft does.
    strong(grown).export(tmp_path / "grown")
    trained, target = DSparkMethod.load(tmp_path / "grown"), (grown.embedding, grown.lm_head)
    untrained = trained.untrained(tmp_path / "draft").drafter(*target)
    assert proposals(untrained) == proposals(DSparkDrafter(begin(tmp_path, seed=5).draft, *target))


def test_it_goes_on_from_a_dspark(tmp_path: Path) -> None:
    first = strong(make_dspark())
    first.export(tmp_path / "draft")
    again = begin(tmp_path)
    assert again.draft.shape == first.draft.shape
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True))
    for changes in ({"markov_rank": 7}, {"block_size": 6}):
        with pytest.raises(ConfigError, match=rf"its {next(iter(changes))} is [56], expected this run's [67]: change"):
            begin(tmp_path, **changes)


def test_its_directory_is_the_published_one(tmp_path: Path) -> None:
    objective = strong(make_dspark(msgspec.structs.replace(CONFIG, sliding_window=9)))
    objective.export(tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    expected = {
        "architectures": ["Qwen3DSparkModel"], "model_type": "qwen3", "is_causal": False, "block_size": 5,
        "mask_token_id": 3, "target_layer_ids": [1, 3, 5], "markov_rank": 6, "markov_head_type": "vanilla",
        "enable_confidence_head": True, "confidence_head_with_markov": True, "sample_from_anchor": True,
    }  # fmt: skip
    assert {key: config.get(key) for key in expected} == expected
    assert "dflash_config" not in config
    weights = load_file(tmp_path / "draft" / "model.safetensors")
    assert {name: list(weight.shape) for name, weight in weights.items() if "head." in name} == {
        "markov_head.markov_w1.weight": [97, 6], "markov_head.markov_w2.weight": [97, 6],
        "confidence_head.proj.weight": [1, HIDDEN + 6], "confidence_head.proj.bias": [1],
    }  # fmt: skip
    assert '"method": "dspark"' in (readme := (tmp_path / "draft" / "README.md").read_text())
    assert '"num_speculative_tokens": 5' in readme
    draft = DSparkMethod.load(tmp_path / "draft")
    assert draft.network.shape == objective.draft.shape
    target = (objective.embedding, objective.lm_head)
    joined, unary = draft.drafter(*target), draft.unary()
    assert joined.block_size == 6
    assert proposals(joined) == proposals(DSparkDrafter(objective.draft, *target))
    assert unary is not None
    assert proposals(unary.drafter(*target)) == proposals(BlockDrafter(objective.draft, *target)) != proposals(joined)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"markov_head_type": "rnn"}, "markov_head_type is 'rnn', expected 'vanilla'"),
        ({"sample_from_anchor": False}, "sample_from_anchor is False, expected True"),
        ({"markov_rank": None}, "has no key 'markov_rank'"),
        ({"markov_rank": 0}, "markov_rank 0: expected a positive number"),
        ({"confidence_head_with_markov": False}, "confidence_head_with_markov is False, expected True"),
        ({"model_type": "deepseek_v4"}, "model_type is 'deepseek_v4', expected 'qwen3'"),
    ],
)
def test_another_kind_of_it_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_dspark().export(tmp_path / "draft")
    path = tmp_path / "draft" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        DSparkMethod.load(tmp_path / "draft")


def test_one_without_a_confidence_head_is_refused(tmp_path: Path) -> None:
    make_dspark().export(tmp_path / "draft")
    weights = load_file(file := tmp_path / "draft" / "model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "confidence" not in name}, file)
    with pytest.raises(CheckpointError, match=r"first 'confidence_head\.proj\.bias': found none, expected \[1\]"):
        DSparkMethod.load(tmp_path / "draft")
