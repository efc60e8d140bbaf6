"""A run that begins with a draft: what its run.json says, what a resumed one must share, and what came before it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from chats import write_target
from specd.cli.main import run
from specd.config.settings import DaemonConfig, RingConfig, TargetConfig
from specd.daemon.serve import Embedded, embedded
from specd.drafts import registry, taught
from specd.drafts.directory import digest
from specd.errors import CheckpointError, ConfigError
from specd.evaluate.results import EvalFacts
from specd.train.directory import beginning, read_facts
from specd.train.trainer import TrainedRun, train_draft

DRAFT = {"mask_token_id": 0, "num_layers": 1, "num_taps": 2, "block_size": 4, "num_anchors": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("targets") / "target", num_layers=8)


@pytest.fixture(scope="module")
def host(model: Path) -> Iterator[Embedded]:
    target = TargetConfig(model=str(model), device="cpu", threads=1, exact=True)
    with embedded(DaemonConfig(target=target, ring=RingConfig(slots=6, slot_tokens=3072))) as host:
        yield host


def settings(tmp_path: Path, name: str, steps: int, init: Path | None = None, **train: Any) -> dict[str, Any]:
    return {
        "method": "dflash", "output": str(tmp_path / name), "draft": DRAFT | ({"init": str(init)} if init else {}),
        "train": {"max_steps": steps, "device": "cpu", "save_every": 1, "warmup_ratio": 0.0, **train},
        "data": {"cache_dir": str(tmp_path / "cache"), "max_samples": 40, "max_length": 128, "batch_tokens": 256},
    }  # fmt: skip


@pytest.fixture(scope="module")
def first(host: Embedded, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run whose draft others begin with; whoever changes it takes a copy."""
    return train_draft(settings(tmp_path_factory.mktemp("runs"), "first", 3, lr=1e-2), host=host)


EAGLE = {"num_steps": 2, "draft_vocab_size": 50}


@pytest.fixture(scope="module")
def eagle(host: Embedded, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    asked = settings(tmp_path_factory.mktemp("runs"), "eagle", 2, lr=1e-3) | {"method": "eagle3", "draft": EAGLE}
    return train_draft(asked, host=host)


def copied(run: TrainedRun, tmp_path: Path) -> TrainedRun:
    directory = shutil.copytree(run.directory, tmp_path / run.directory.name)
    return TrainedRun(directory, directory / "draft", run.steps)


def losses(path: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_it_goes_on_from_another_draft_and_says_so(
    host: Embedded, first: TrainedRun, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = copied(first, tmp_path)
    second = train_draft(settings(tmp_path, "second", 1, first.directory, lr=1e-30), host=host)
    cold = train_draft(settings(tmp_path, "cold", 1), host=host)
    assert losses(second.directory)[0] != losses(cold.directory)[0]
    ours, theirs = (load_file(path / "model.safetensors") for path in (second.draft, first.draft))
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items()), "a step of no length changes nothing"

    facts = read_facts(second.directory)
    assert facts.draft["initial weights"] == f"{first.draft} (sha256 {digest(first.draft)})"
    assert "initial weights" not in read_facts(first.directory).draft
    assert beginning(facts) == first.draft
    assert beginning(read_facts(first.directory)) == 0
    assert f"sha256 {digest(first.draft)}" in (second.draft / "README.md").read_text()
    assert run(["report", str(second.directory)]) == 0
    assert "initial weights" in (second.directory / "report.html").read_text()
    capsys.readouterr()

    # Its draft before training is the other one, not one of random weights.
    arguments = ["eval", "--limit", "1", "--max-new-tokens", "4", "--device", "cpu", "--json", "--untrained"]
    assert run([*arguments, "--draft", str(second.directory), "--model", str(model)]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=dict[str, EvalFacts])
    assert run([*arguments[:-1], "--draft", str(first.draft), "--model", str(model)]) == 0
    before = msgspec.json.decode(capsys.readouterr().out, type=dict[str, EvalFacts])["trained"]
    assert found["untrained"].result.forwards == before.result.forwards

    # Nor is it any other draft that lies there by now.
    shutil.copytree(cold.draft, first.draft, dirs_exist_ok=True)
    assert run([*arguments, "--draft", str(second.directory), "--model", str(model)]) == 2
    assert "expected the draft that the run began with" in capsys.readouterr().err
    shutil.rmtree(first.draft)
    with pytest.raises(CheckpointError, match="is no draft directory"):
        beginning(facts)


def test_a_resumed_run_begins_with_the_same_draft_wherever_it_lies(
    host: Embedded, first: TrainedRun, tmp_path: Path
) -> None:
    other = train_draft(settings(tmp_path, "other", 1, lr=2e-2), host=host)
    whole = train_draft(settings(tmp_path, "whole", 4, first.draft, lr=1e-3), host=host)
    moved = tmp_path / "moved"
    shutil.copytree(first.draft, moved)

    cut = settings(tmp_path, "cut", 4, first.draft, lr=1e-3, keep=4)
    train_draft(cut, host=host)
    for later in ("step-00000003", "step-00000004"):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / later, ignore_errors=True)
    shutil.rmtree(tmp_path / "cut" / "draft")
    with pytest.raises(CheckpointError, match=r"draft\.init"):
        train_draft(settings(tmp_path, "cut", 4, other.draft, lr=1e-3), host=host, resume=True)
    cut["draft"]["init"] = str(moved)
    again = train_draft(cut, host=host, resume=True)
    assert losses(again.directory) == losses(whole.directory)
    ours, theirs = (load_file(path / "model.safetensors") for path in (again.draft, whole.draft))
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_size": 6}, "its block_size is 4, expected this run's 6: change draft.block_size"),
        ({"num_layers": 2}, "its num_layers is 1, expected this run's 2"),
        ({"num_taps": 3}, "its number of taps is 2, expected this run's 3"),
    ],
)
def test_a_draft_of_another_shape_is_refused(
    host: Embedded, first: TrainedRun, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    asked = settings(tmp_path, "second", 1, first.draft)
    asked["draft"] |= changes
    with pytest.raises(ConfigError, match=reason):
        train_draft(asked, host=host)


def test_what_is_no_draft_is_refused(host: Embedded, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no draft directory"):
        train_draft(settings(tmp_path, "run", 1, tmp_path / "nothing"), host=host)


def test_a_published_draft_is_as_good_as_an_own_one(host: Embedded, first: TrainedRun, tmp_path: Path) -> None:
    first = copied(first, tmp_path)
    config = json.loads((first.draft / "config.json").read_text())
    config["dflash_config"]["block_size"] = config.pop("block_size")
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    (first.draft / "config.json").write_text(json.dumps(config))
    asked = settings(tmp_path, "second", 1, first.draft)
    asked["draft"]["mask_token_id"] = -1  # which is its own, and none is chosen
    second = train_draft(asked, host=host)
    config = json.loads((second.draft / "config.json").read_text())
    assert config["dflash_config"]["mask_token_id"] == DRAFT["mask_token_id"]
    assert registry.read(second.draft)


def test_an_eagle3_draft_keeps_its_vocabulary_from_run_to_run(
    host: Embedded, eagle: TrainedRun, tmp_path: Path
) -> None:
    asked = settings(tmp_path, "second", 2, lr=1e-3)
    asked |= {"method": "eagle3", "draft": EAGLE | {"init": str(eagle.directory)}}
    asked["data"] = asked["data"] | {"max_samples": 9}  # whose most frequent labels are others
    second = train_draft(asked, host=host)
    ours, theirs = (load_file(path / "model.safetensors") for path in (second.draft, eagle.draft))
    assert ours["d2t"].equal(theirs["d2t"])
    assert not ours["lm_head.weight"].equal(theirs["lm_head.weight"])
    assert read_facts(second.directory).draft["initial weights"].startswith(str(eagle.draft))


def test_an_eagle3_draft_is_compared_with_what_it_began_with_by_as_many_guesses(
    host: Embedded, eagle: TrainedRun, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = settings(tmp_path, "second", 1)
    asked |= {"method": "eagle3", "draft": EAGLE | {"num_steps": 4, "init": str(eagle.directory)}}
    second = train_draft(asked, host=host)
    command = ["eval", "--draft", str(second.directory), "--model", str(model), "--untrained", "--limit", "1"]
    capsys.readouterr()
    assert run([*command, "--max-new-tokens", "4", "--device", "cpu"]) == 0
    before, after = (
        msgspec.json.decode((second.directory / file).read_bytes(), type=EvalFacts)
        for file in ("eval-untrained.json", "eval.json")
    )
    assert before.texts == after.texts
    assert (before.block_size, len(before.result.acceptance_by_offset)) == (5, 4)


def test_a_run_that_had_nothing_to_learn_is_told_of(
    host: Embedded, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's most likely token is in no draft vocabulary, as if it spoke another language."""
    caplog.set_level(logging.WARNING, "specd.train.trainer")
    asked = settings(tmp_path, "first", 2) | {"method": "eagle3", "draft": EAGLE}
    train_draft(asked, host=host)
    assert "had a prediction to learn from" not in caplog.text
    inside = taught._inside
    monkeypatch.setattr(
        taught, "_inside", lambda *given: inside(*given)._replace(counts=torch.zeros(given[0].shape[0]))
    )
    train_draft(asked | {"output": str(tmp_path / "second")}, host=host)
    assert "none of the 2 steps had a prediction to learn from, so the draft is as it began" in caplog.text
