"""Checkpoints: atomic, whole or ignored, and refused by a run that differs."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specd.config.settings import DataConfig
from specd.errors import CheckpointError
from specd.train import checkpoint
from specd.train.checkpoint import Checkpoints, Identity, Position, RngStates

IDENTITY = Identity(target="llama:576:abc", settings={"train.seed": 0, "draft.taps": (1, 2), "data.max_length": 64})


class Draft(torch.nn.Module):
    """A trained layer, a persistent buffer, and a frozen head that no checkpoint should carry."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, width)
        self.head = torch.nn.Linear(width, 50, bias=False).requires_grad_(False)
        self.register_buffer("map", torch.arange(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.layer(hidden))
        return result


def trained(steps: int = 3, width: int = 4) -> tuple[Draft, torch.optim.AdamW]:
    draft = Draft(width)
    optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=0.1, fused=True)
    for step in range(steps):
        optimizer.zero_grad()
        draft(torch.full((2, 4), 1.0 + step)).square().mean().backward()
        optimizer.step()
    return draft, optimizer


def saved(
    directory: Path, steps: tuple[int, ...] = (3,), keep: int = 2
) -> tuple[Checkpoints, Draft, torch.optim.AdamW]:
    draft, optimizer = trained()
    checkpoints = Checkpoints(directory, IDENTITY, keep)
    for step in steps:
        checkpoints.save(Position(step=step, epoch=1, index=step * 2), draft, optimizer, RngStates.capture())
    return checkpoints, draft, optimizer


def test_round_trip_restores_weights_moments_rng_and_position(tmp_path: Path) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    checkpoints, draft, optimizer = saved(tmp_path)
    drawn = (torch.rand(3).tolist(), random.random(), np.random.rand())
    other, fresh = trained(1)
    position = checkpoints.restore(checkpoints.latest(), other, fresh)
    assert position == Position(step=3, epoch=1, index=6)
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == drawn
    for one, two in zip(draft.layer.parameters(), other.layer.parameters(), strict=True):
        assert torch.equal(one, two)
        assert optimizer.state[one].keys() == fresh.state[two].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(value, fresh.state[two][key]) for key, value in optimizer.state[one].items())


def test_only_what_is_trained_is_stored(tmp_path: Path) -> None:
    checkpoints, _, _ = saved(tmp_path)
    assert sorted(load_file(checkpoints.latest() / "model.safetensors")) == ["layer.bias", "layer.weight", "map"]
    assert not list(tmp_path.rglob("*.p*t*"))


def test_only_the_newest_stay(tmp_path: Path) -> None:
    checkpoints, _, _ = saved(tmp_path, steps=(2, 9, 10, 100), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert checkpoints.latest().name == "step-00000100"
    with pytest.raises(CheckpointError, match=r"train\.keep is 0"):
        Checkpoints(tmp_path, IDENTITY, 0)


def test_an_existing_step_is_not_written_again(tmp_path: Path) -> None:
    checkpoints, draft, optimizer = saved(tmp_path)
    stamp = (checkpoints.latest() / "state.json").stat().st_mtime_ns
    checkpoints.save(Position(step=3), draft, optimizer, RngStates.capture())
    assert (checkpoints.latest() / "state.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("name", ["state.json", "model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("how", ["missing", "short"])
def test_torn_checkpoints_are_passed_over(tmp_path: Path, name: str, how: str) -> None:
    checkpoints, _, _ = saved(tmp_path, steps=(1, 2))
    victim = tmp_path / "step-00000002" / name
    victim.unlink() if how == "missing" else victim.write_bytes(victim.read_bytes()[:-7])
    assert checkpoints.latest().name == "step-00000001"


def test_a_write_that_dies_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, draft, optimizer = saved(tmp_path, steps=(1,))

    class Died(BaseException):
        pass

    def die(path: Path, target: Path) -> None:
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(Died):
            checkpoints.save(Position(step=2), draft, optimizer, RngStates.capture())
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints.latest().name == "step-00000001"
    checkpoints.save(Position(step=3), draft, optimizer, RngStates.capture())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, draft, optimizer = saved(tmp_path, steps=(1,))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-00000002.*No space left.*`specd resume "):
        checkpoints.save(Position(step=2), draft, optimizer, RngStates.capture())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_nothing_to_resume_says_so(tmp_path: Path) -> None:
    checkpoints, _, _ = saved(tmp_path / "a", steps=(1,))
    (checkpoints.latest() / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint in .*1 torn.*anew, in another --output"):
        checkpoints.latest()
    with pytest.raises(CheckpointError, match="0 torn"):
        Checkpoints(tmp_path / "nowhere", IDENTITY).latest()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_flipped_bit_is_corrupt(tmp_path: Path, name: str) -> None:
    checkpoints, _, _ = saved(tmp_path)
    path = checkpoints.latest() / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    draft, optimizer = trained(1)
    before = draft.layer.weight.detach().clone()
    with pytest.raises(CheckpointError, match=rf"{name} is corrupt.*delete"):
        checkpoints.restore(checkpoints.latest(), draft, optimizer)
    assert torch.equal(before, draft.layer.weight)


def test_another_target_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    saved(tmp_path)
    other = Checkpoints(tmp_path, Identity(target="qwen3:2048:def", settings=IDENTITY.settings))
    with pytest.raises(CheckpointError, match=r"trained on target llama:576:abc, the daemon hosts qwen3:2048:def"):
        other.restore(other.latest(), *trained(1))


def test_another_plan_is_refused_with_old_and_new_values(tmp_path: Path) -> None:
    saved(tmp_path)
    changed = {"train.seed": 1, "draft.taps": [1, 2], "data.path": "x"}
    other = Checkpoints(tmp_path, Identity(target=IDENTITY.target, settings=changed))
    wanted = r"data\.max_length was 64, is None; data\.path was None, is 'x'; train\.seed was 0, is 1: give the old"
    with pytest.raises(CheckpointError, match=wanted):
        other.restore(other.latest(), *trained(1))


def test_a_run_of_0_1_0_resumes_whatever_its_recipes_mask_token_was(tmp_path: Path) -> None:
    now = Checkpoints(tmp_path, Identity(target="", settings={"method": "dflash", "draft.mask_token_id": 9}))

    def resume(settings: dict[str, Any]) -> None:
        old = Checkpoints(tmp_path, Identity(target="", settings=settings))
        path = old.save(Position(step=1), *trained(), RngStates.capture())
        try:
            now.compare(path)
        finally:
            shutil.rmtree(path)

    resume({"draft.mask_token_id": -1})
    resume({"draft.mask_token_id": 9})
    with pytest.raises(CheckpointError, match=r"draft\.mask_token_id was 8, is 9"):
        resume({"draft.mask_token_id": 8})
    with pytest.raises(CheckpointError, match=r"draft\.mask_token_id was -1, is 9; method was 'mine', is 'dflash'"):
        resume({"method": "mine", "draft.mask_token_id": -1})


def test_settings_that_a_run_of_0_1_0_does_not_name_are_what_it_did(tmp_path: Path) -> None:
    own = {f"data.{name}": value for name, value in msgspec.to_builtins(DataConfig()).items()}
    later = {"data.columns", "data.date", "data.long", "data.packing", "data.subset", "data.weights"}
    old = Checkpoints(tmp_path, Identity(target="", settings={k: own[k] for k in own.keys() - later}))
    path = old.save(Position(step=1), *trained(), RngStates.capture())
    Checkpoints(tmp_path, Identity(target="", settings=own)).compare(path)
    with pytest.raises(CheckpointError, match=r"data\.long was 'cut', is 'split': give"):
        Checkpoints(tmp_path, Identity(target="", settings=own | {"data.long": "split"})).compare(path)


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints, _, _ = saved(tmp_path)
    with pytest.raises(CheckpointError, match=r"layer\.bias has shape \(4,\) there and \(5,\) in this draft"):
        checkpoints.restore(checkpoints.latest(), *trained(1, width=5))


def test_a_vanished_checkpoint_is_a_clear_error(tmp_path: Path) -> None:
    checkpoints, draft, optimizer = saved(tmp_path)
    path = checkpoints.latest()
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="no complete checkpoint: delete it"):
        checkpoints.restore(path, draft, optimizer)
