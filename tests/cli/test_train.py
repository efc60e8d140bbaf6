"""`specd train dflash`: the settings of a target that it hosts itself, and what a daemon's target may not be told."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import specd.daemon.serve
from specd.cli.main import app, run
from specd.config.presets import Preset
from specd.config.settings import DaemonConfig, TargetConfig
from specd.errors import DaemonError
from tiny import TARGET, TINY


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> list[DaemonConfig]:
    """What would be hosted; the run ends there."""
    seen: list[DaemonConfig] = []

    def embedded(settings: DaemonConfig) -> None:
        seen.append(settings)
        raise DaemonError("looked at")

    monkeypatch.setattr(specd.daemon.serve, "embedded", embedded)
    return seen


def train(output: Path, *arguments: str) -> int:
    return run(["--quiet", "train", "dflash", "--output", str(output), *arguments])


def asked(tmp_path: Path, hosted: list[DaemonConfig], *arguments: str) -> TargetConfig:
    """The target that this command hosts."""
    assert train(tmp_path / "run", *arguments, "--set", "draft.mask_token_id=9") == 1
    return hosted.pop().target


def test_a_hosted_target_is_configured_by_flag_set_and_file(tmp_path: Path, hosted: list[DaemonConfig]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("target: {exact: false, dtype: float16, load_format: dummy}\n")
    target = asked(
        tmp_path, hosted, "--model", "smollm2-135m", "--config", str(file), "--exact", "--set", "target.dtype=bfloat16"
    )
    assert target == TargetConfig(model="smollm2-135m", exact=True, dtype="bfloat16", load_format="dummy", threads=1), (
        "--set over flags over the file over the preset's recipe, whose threads stay"
    )
    assert not asked(
        tmp_path, hosted, "--model", TARGET, "--set", "target.exact=true", "--set", "target.exact=no"
    ).exact
    file.write_text("target: {exact: true}\n")
    assert not asked(tmp_path, hosted, "--model", TARGET, "--config", str(file), "--merged").exact


def test_a_hosted_target_runs_where_the_trainer_does_unless_told(tmp_path: Path, hosted: list[DaemonConfig]) -> None:
    assert asked(tmp_path, hosted, "--model", TARGET) == TargetConfig(model=TARGET)
    assert asked(tmp_path, hosted, "--model", TARGET, "--device", "cpu").device == "cpu"
    apart = asked(tmp_path, hosted, "--model", TARGET, "--device", "cpu", "--set", "target.device=cuda:1")
    assert apart.device == "cuda:1"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("target.exakt=true", "unknown field `exakt` - at `$.target`"),
        ("target.exact=3", "Expected `bool`, got `int` - at `$.target.exact`"),
        (
            "target.dtype=int4",
            "Invalid enum value 'int4', expected one of auto, float32, bfloat16, float16 - at `$.target.dtype`",
        ),
        ("target=exact", "Expected `object`, got `str` - at `$.target`"),
    ],
)
def test_wrong_settings_of_a_target_are_refused_as_start_does(
    setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "--model", TARGET, "--set", setting) == 2
    error = capsys.readouterr().err
    assert error.startswith("specd: error: settings: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists(), "nothing is begun"
    if setting.startswith("target."):
        assert run(["start", "--model", TARGET, "--set", setting]) == 2
        assert message in capsys.readouterr().err


def test_the_model_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], hosted: list[DaemonConfig]
) -> None:
    assert train(tmp_path / "run", "--model", TARGET, "--set", "target.model=gpt2") == 2
    assert f"target.model='gpt2': expected {TARGET!r}" in capsys.readouterr().err
    assert asked(tmp_path, hosted, "--model", TARGET, "--set", f"target.model='{TARGET}'").model == TARGET


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--endpoint", "ipc:///a"], "--endpoint ipc:///a uses a daemon: give one"),
        (["--share", "s"], "share 's': expected none, as --model"),
        (["--set", "subscriber.endpoints=['ipc:///a']"], "--endpoint ipc:///a uses a daemon: give one"),
        (["--transport", "shm"], "transport 'shm': expected auto or inproc, as --model"),
        (["--set", "draft.mask_token_id=-1"], "no mask token is known for target"),
    ],
)
def test_what_cannot_go_with_a_hosted_target_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "--model", TARGET, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing is begun"


@pytest.mark.usefixtures("example")
def test_a_draft_of_another_dtype_than_its_targets_fits_the_slots(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*command[:6], "--set", "target.dtype=bfloat16", "--set", "data.batch_tokens=58", "--max-steps", "2"]
    assert run(["--quiet", "train", "toy", "--output", str(tmp_path / "run"), *arguments]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--set", "target.dtype=bfloat16"], ["--exact"], ["--merged"]])
def test_a_daemons_target_is_not_configured_by_its_trainer(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint = f"ipc://{tmp_path}/none.sock"
    assert train(tmp_path / "run", "--endpoint", endpoint, "--set", "subscriber.connect_s=0.2", *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(r"settings: target=\{'(dtype|exact)': .*\}: expected none.*`specd start`.*--model NAME", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_names_the_settings_of_a_hosted_target() -> None:
    text = CliRunner().invoke(app, ["train", "dflash", "--help"], env={"COLUMNS": "200"}).output
    panel = text[text.index("Hidden states") : text.index(" Run ")]
    assert "--exact" in panel
    assert "--merged" in panel
    assert "target.device" in text
    assert "--set target.dtype=bfloat16" in text


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments of a short run on a target hosted here."""
    data = tmp_path / "tokens.jsonl"
    rows: list[dict[str, Any]] = [
        {"input_ids": [(i * j) % 250 for j in range(1, 30)], "loss_mask": [1] * 29} for i in range(1, 9)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    return ["--model", TARGET, "--device", "cpu", "--data", str(data), *pairs]


def test_a_run_resumes_on_a_target_of_the_same_states(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", *command, "--exact", "--max-steps", "1") == 0, capsys.readouterr().err
    facts = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert facts["config"]["target"] == {"model": TARGET, "exact": True}
    command += ["--resume", "--max-steps", "1"]
    assert train(tmp_path / "run", *command, "--set", "target.max_forward_tokens=80") == 0, capsys.readouterr().err
    assert train(tmp_path / "run", *command, "--set", "target.dtype=bfloat16") == 1
    assert re.search(r"float32.*bfloat16|bfloat16.*float32", capsys.readouterr().err)


def test_a_run_keeps_the_dtype_that_auto_meant_on_its_first_device(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command += ["--max-steps", "1"]
    assert train(tmp_path / "auto", *command) == 0, capsys.readouterr().err
    explicit = ["--resume", "--set", "train.dtype=float32"]
    assert train(tmp_path / "auto", *command, *explicit) == 0, capsys.readouterr().err
    assert train(tmp_path / "gpu", *command, "--set", "train.dtype=bfloat16") == 0, capsys.readouterr().err
    assert train(tmp_path / "gpu", *command, "--resume") == 1
    assert "train.dtype was 'bfloat16', is 'float32'" in capsys.readouterr().err


def test_the_recipe_of_a_preset_is_used_as_a_whole(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"train": {"threads": 3, "save_every": 2}, "subscriber": {"depth": 1}}
    recipe = Preset(name="tiny", run={"dflash": own, "another": {"train": {"threads": 99}}})
    monkeypatch.setattr("specd.config.presets.preset", lambda name: recipe)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert train(tmp_path / "run", *command, "--max-steps", "3") == 0, capsys.readouterr().err
    assert threads == [3]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000002", "step-00000003"]
    shutil.rmtree(checkpoints)
    shutil.rmtree(tmp_path / "run" / "draft")  # else the run is finished
    assert train(tmp_path / "run", *command, "--max-steps", "3", "--resume") == 1
    assert "has 3 steps but there is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "remedy"),
    [
        ("specd.train.preparation.prepare", "give the same command again"),
        ("specd.train.trainer.train", "specd resume"),
    ],
)
def test_an_interrupted_run_goes_on_as_it_says(
    where: str,
    remedy: str,
    tmp_path: Path,
    command: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    command += ["--max-steps", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(where, interrupt)
        assert train(tmp_path / "run", *command) == 130
    assert remedy in capsys.readouterr().err
    if remedy == "specd resume":
        assert run(["--quiet", "resume", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    else:
        assert train(tmp_path / "run", *command) == 0, capsys.readouterr().err
