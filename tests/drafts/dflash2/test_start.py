"""A DFlash2 draft that begins with another draft's weights, and what it writes and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from dflash2 import CONFIG, make_dflash2, strong
from drafts import CONFIG as DFLASH
from drafts import CONTRACT, HIDDEN, deliver, make_batch, make_draft, parts
from specd.drafts.backbone.drafter import BlockDrafter
from specd.drafts.dflash2.drafter import DFlash2Drafter
from specd.drafts.dflash2.method import DFlash2Method
from specd.drafts.dflash2.objective import DFlash2
from specd.errors import CheckpointError, ConfigError

PLAIN = msgspec.structs.replace(DFLASH, block_size=CONFIG.block_size)


def begin(path: Path, seed: int = 1, **changes: Any) -> DFlash2:
    config = msgspec.structs.replace(CONFIG, init=str(path), mask_token_id=-1, **changes)
    DFlash2Method.check(config, "tiny")
    DFlash2Method.capture(config, CONTRACT)
    return DFlash2(config, parts(), seed=seed)


def proposals(drafter: BlockDrafter) -> list[list[int]]:
    taps = torch.randn(9, 3 * HIDDEN, generator=torch.Generator().manual_seed(4))
    found = []
    with torch.inference_mode():
        for length in (3, 6, 9):
            drafter.reset()
            drafter.extend(torch.arange(length), taps[:length])
            found.append(drafter.propose(7).tolist())
    return found


def test_a_dflash_becomes_its_backbone(tmp_path: Path) -> None:
    plain = make_draft(PLAIN, seed=4)
    with torch.no_grad():
        for weight in plain.module.parameters():
            weight.add_(0.01)
    plain.export(tmp_path / "draft")
    grown = begin(tmp_path)
    weights = grown.module.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in plain.module.state_dict().items())
    fresh = make_dflash2(seed=1).module.state_dict()
    assert all(torch.equal(weights[name], fresh[name]) for name in fresh.keys() - plain.module.state_dict().keys())
    assert grown.draft.shape.mask_token_id == 3
    assert grown.draft.shape.is_causal is False
    delivery = deliver(make_batch())
    metrics = make_draft(PLAIN, seed=1)
    metrics.module.load_state_dict(plain.module.state_dict())
    assert torch.equal(
        grown.loss(delivery).metrics["unary_correct"], metrics.loss(delivery).metrics["correct"]
    )  # fmt: skip
    assert str(tmp_path / "draft") in grown.facts()["initial weights"]
    # What it began with decodes as that draft does.
    strong(grown).export(tmp_path / "grown")
    trained, target = DFlash2Method.load(tmp_path / "grown"), (grown.embedding, grown.lm_head)
    untrained = trained.untrained(tmp_path / "draft").drafter(*target)
    assert proposals(untrained) == proposals(DFlash2Drafter(begin(tmp_path, seed=5).draft, *target))


def test_it_goes_on_from_a_dflash2(tmp_path: Path) -> None:
    first = strong(make_dflash2())
    first.export(tmp_path / "draft")
    again = begin(tmp_path)
    assert again.draft.shape == first.draft.shape
    assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"its selector_rank is 6, expected this run's 7: change draft"):
        begin(tmp_path, selector_rank=7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"block_size": 4}, r"its block_size is 4, expected this run's 5"), ({"num_layers": 1}, "its num_layers is 1")],
)
def test_a_dflash_of_another_shape_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    make_draft(msgspec.structs.replace(PLAIN, **changes)).export(tmp_path / "draft")
    with pytest.raises(ConfigError, match=message):
        begin(tmp_path)


def test_its_directory_is_the_published_one(tmp_path: Path) -> None:
    objective = strong(make_dflash2(msgspec.structs.replace(CONFIG, sliding_window=9)))
    objective.export(tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    assert (config["architectures"], config["is_causal"], config["block_size"]) == (["DFlash2DraftModel"], False, 5)
    assert config["dflash_config"] == {
        "block_size": 5, "mask_token_id": 3, "target_layer_ids": [1, 3, 5], "conv_kernel_size": 2,
        "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 30,
    }  # fmt: skip
    names = load_file(tmp_path / "draft" / "model.safetensors").keys()
    assert "candidate_selector.predecessor_codebook" in names
    assert "layers.1.mlp_conv.kernel_projection.weight" in names
    assert '"num_speculative_tokens": 4' in (tmp_path / "draft" / "README.md").read_text()
    draft = DFlash2Method.load(tmp_path / "draft")
    assert draft.network.shape == objective.draft.shape
    target = (objective.embedding, objective.lm_head)
    selected, unary = proposals(draft.drafter(*target)), draft.unary()
    assert selected == proposals(DFlash2Drafter(objective.draft, *target))
    assert unary is not None
    assert proposals(unary.drafter(*target)) == proposals(BlockDrafter(objective.draft, *target)) != selected
    assert unary.unary() is None, "there is nothing more to leave out"


def test_a_directory_without_its_parts_is_refused(tmp_path: Path) -> None:
    make_dflash2().export(tmp_path / "draft")
    path = tmp_path / "draft" / "config.json"
    config = json.loads(path.read_text())
    for key in ("conv_kernel_size", "selector_top_k"):
        nested = {name: value for name, value in config["dflash_config"].items() if name != key}
        path.write_text(json.dumps(config | {"dflash_config": nested}))
        with pytest.raises(ConfigError, match=f"has no key '{key}'"):
            DFlash2Method.load(tmp_path / "draft")
    path.write_text(json.dumps(config | {"is_causal": True}))
    with pytest.raises(ConfigError, match="is_causal is True, expected False"):
        DFlash2Method.load(tmp_path / "draft")
    path.write_text(json.dumps(config))
    weights = load_file(tmp_path / "draft" / "model.safetensors")
    name = "candidate_selector.successor_codebook"
    save_file(weights | {f"{name}.weight": weights.pop(name)}, tmp_path / "draft" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"successor_codebook': found none"):
        DFlash2Method.load(tmp_path / "draft")
