"""A DFlash draft that begins with the weights of another: whose they are, and what must fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from drafts import CONFIG, CONTRACT, deliver, make_batch, make_draft, parts
from specd.drafts.dflash.method import DFlashMethod
from specd.drafts.dflash.objective import DFlash
from specd.drafts.dflash.settings import DFlashConfig
from specd.errors import CheckpointError, ConfigError

WINDOWS = msgspec.structs.replace(CONFIG, num_layers=3, sliding_window=6, full_layers=1)


def begin(config: Any, path: Path, seed: int = 1, **changes: Any) -> DFlash:
    config = msgspec.structs.replace(config, init=str(path), **changes)
    DFlashMethod.check(config, "tiny")
    DFlashMethod.capture(config, CONTRACT)
    return DFlash(config, parts(), seed=seed)


@pytest.mark.parametrize("config", [CONFIG, WINDOWS, msgspec.structs.replace(WINDOWS, sliding_causal=False)])
def test_it_begins_where_another_ended(tmp_path: Path, config: Any) -> None:
    first = make_draft(config, seed=4)
    with torch.no_grad():
        for weight in first.module.parameters():
            weight.add_(0.01)
    first.export(tmp_path / "run" / "draft")
    delivery = deliver(make_batch())
    for place in ("run/draft", "run"):  # a run is a name for its draft
        again = begin(config, tmp_path / place)
        assert again.draft.shape == first.draft.shape
        assert all(torch.equal(a, b) for a, b in zip(first.module.parameters(), again.module.parameters(), strict=True))
    assert torch.equal(
        begin(config, tmp_path / "run", seed=0).loss(delivery).sum, make_same(first, 0).loss(delivery).sum
    )
    fact = again.facts()["initial weights"]
    assert fact.startswith(f"{tmp_path / 'run' / 'draft'} (sha256 ")
    assert "initial weights" not in first.facts()


def test_it_goes_on_with_the_embedding_of_its_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_draft(CONFIG).export(tmp_path / "draft")
    config = msgspec.structs.replace(CONFIG, init=str(tmp_path / "draft"))
    assert DFlash(config, parts(figures={"embedding_scale": 8.0})).draft.shape.input_embedding_scale == 8.0
    assert "its input_embedding_scale is 1, that of the target 8, with which it goes on" in caplog.text


def make_same(draft: DFlash, seed: int) -> DFlash:
    """A new objective that draws its anchors by `seed`, with the weights of `draft`."""
    assert isinstance(draft.config, DFlashConfig)
    found = make_draft(draft.config, seed=seed)
    found.module.load_state_dict(draft.module.state_dict())
    return found


def test_what_settings_do_not_say_is_the_other_drafts(tmp_path: Path) -> None:
    make_draft().export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config |= {"rope_scaling": scaling, "rope_theta": 77.0, "rms_norm_eps": 1e-3, "num_target_layers": None}
    config["dflash_config"] = {"mask_token_id": 9, "target_layer_ids": [0, 2, 6]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = begin(CONFIG, tmp_path, mask_token_id=-1)
    shape = found.draft.shape
    assert (shape.rope_theta, shape.rms_norm_eps, shape.mask_token_id) == (77.0, 1e-3, 9)
    assert (shape.rope_scaling, shape.taps, shape.num_target_layers) == (scaling, (0, 2, 6), 8)
    assert DFlashMethod.capture(found.config, CONTRACT).taps == (0, 2, 6)
    found.export(tmp_path / "again")
    assert DFlashMethod.load(tmp_path / "again").network.shape == shape


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_layers": 3}, "its num_layers is 2, expected this run's 3: change draft.num_layers, or leave"),
        ({"block_size": 5}, "its block_size is 4, expected this run's 5: change draft.block_size"),
        ({"mask_token_id": 8}, "its mask_token_id is 3, expected this run's 8"),
        ({"num_taps": 2}, "its number of taps is 3, expected this run's 2: change draft.num_taps"),
        ({"head_dim": 4}, "its head_dim is 8, expected this run's 4"),
        ({"num_kv_heads": 1}, "its num_kv_heads is 2, expected this run's 1"),
        ({"intermediate_size": 40}, "its intermediate_size is 48, expected this run's 40"),
        ({"sliding_window": 9}, "its layer_types is .*: change draft.sliding_window or draft.full_layers"),
    ],
)
def test_a_draft_of_another_shape_is_refused_by_what_differs(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    make_draft().export(tmp_path)
    with pytest.raises(ConfigError, match=reason):
        begin(CONFIG, tmp_path, **changes)


def test_windows_of_another_kind_are_refused(tmp_path: Path) -> None:
    make_draft(WINDOWS).export(tmp_path)
    with pytest.raises(
        ConfigError, match=r"causal layers is \[0, 1\], expected this run's \[\]: change draft.sliding_c"
    ):
        begin(WINDOWS, tmp_path, sliding_causal=False)
    with pytest.raises(
        ConfigError, match=r"its sliding_window is 6, expected this run's 7: change draft.sliding_window"
    ):
        begin(WINDOWS, tmp_path, sliding_window=7)


def test_a_draft_for_another_target_is_refused(tmp_path: Path) -> None:
    make_draft().export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 98}))
    with pytest.raises(ConfigError, match="its vocab_size is 98, expected this run's 97: it is a draft for"):
        begin(CONFIG, tmp_path)
    config["dflash_config"]["target_layer_ids"] = [1, 3, 7]
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_target_layers": 9}))
    with pytest.raises(ConfigError, match=r"draft.init=.* is a draft for another target: taps \[1, 3, 7\]"):
        begin(CONFIG, tmp_path)


def test_what_is_no_draft_is_refused_before_a_target_is_loaded(tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, init=str(tmp_path))
    with pytest.raises(CheckpointError, match="is no draft directory"):
        DFlashMethod.check(config, "tiny")
    make_draft().export(tmp_path / "draft")
    (tmp_path / "draft" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is no draft directory"):
        DFlashMethod.check(config, "tiny")


@pytest.mark.parametrize(("layers", "window", "full"), [(2, 0, 1), (2, 9, 2), (2, 9, 3)])
def test_full_layers_need_others_that_slide(layers: int, window: int, full: int) -> None:
    config = msgspec.structs.replace(CONFIG, num_layers=layers, sliding_window=window, full_layers=full)
    with pytest.raises(ConfigError, match=rf"draft.full_layers={full} of 2 layers with draft.sliding_window={window}"):
        DFlashMethod.check(config, "tiny")
