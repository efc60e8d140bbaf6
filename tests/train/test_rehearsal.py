"""`--dry-run`: the checks, steps and sizes are those of the run that follows, and nothing is loaded or written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from chats import talk, write_rows, write_target
from specd.cli.main import run
from specd.data.batching import Loader, Place
from specd.errors import ConfigError
from specd.train.export import find
from specd.train.journal import read
from specd.train.plan import Plan, longest
from specd.train.rehearsal import contract_of

SMALL = ("num_layers=1", "num_taps=2", "block_size=4", "num_anchors=4", "mask_token_id=9")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "cache"))
    target = write_target(tmp_path / "target", num_layers=6)
    data = write_rows(tmp_path / "rows.jsonl", *({"messages": talk("Hi", f"Hello {i}. " * 9)} for i in range(12)))
    settings = (*(f"draft.{one}" for one in SMALL), "data.max_length=64", "data.batch_tokens=128", "train.epochs=2")
    arguments = ["--data", data, "--output", str(tmp_path / "run"), "--device", "cpu", "--model", str(target)]
    return ["-q", "train", "dflash", *arguments, *(f"--set={one}" for one in settings)]


def test_the_run_is_as_it_was_said(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("specd.daemon.serve.embedded", lambda settings: pytest.fail("it was loaded"))
        assert run([*command, "--dry-run"]) == 0, capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    said = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert run([*command, "--set", "train.threads=1"]) == 0, capsys.readouterr().err
    facts = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert f"{facts['draft']['trained parameters']} trained parameters" in said["draft"]
    assert f"layers {facts['draft']['taps']}" in said["captured"]
    assert f"{facts['data']['samples']} samples" in said["data"]
    steps = len(read(tmp_path / "run" / "metrics.jsonl"))
    assert said["steps"].split()[0] == str(steps)
    found = find(tmp_path / "run")
    assert found.facts is not None
    assert found.facts.steps == steps
    checkpoint = sum(
        file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / f"step-{steps:08d}").rglob("*.safetensors")
    )
    number, unit = said["disk"].split()[:2]
    assert unit == "KiB"
    assert float(number) * 1024 == pytest.approx(checkpoint, rel=0.2)
    assert run([*command, "--dry-run"]) == 2
    assert "exists and is not empty: go on with that run by `specd resume " in capsys.readouterr().err
    assert run([*command, "--dry-run", "--resume"]) == 0
    assert f"{steps} of them are done" in capsys.readouterr().out


def test_batches_that_are_held_out_are_looked_at_too(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be the largest, and a slot has to take them."""
    held: list[int] = []

    def looked_at(batches: Loader, places: list[Place], plan: Plan, accumulation: int) -> int:
        held.extend(place.tokens for place in places)
        return longest(batches, places, plan, accumulation)

    monkeypatch.setattr("specd.train.rehearsal.longest", looked_at)
    assert run([*command, "--dry-run", "--set", "validation.share=0.2"]) == 0, capsys.readouterr().err
    assert held
    assert min(held) > 0


def test_a_run_of_float8_states_decodes_with_the_targets_own(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = []
    for dtype in ("auto", "float8_e4m3fn"):
        assert run([*command, "--set", f"capture.dtype={dtype}", "--dry-run"]) == 0, capsys.readouterr().err
        said = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
        sizes.append(float(said["states"].split()[0]))
    assert sizes == [32.0, 12.0], "float32 in a byte, and a page of scales"
    arguments = ["--set", "capture.dtype=float8_e4m3fn", "--max-steps", "2", "--set", "validation.share=0.2"]
    arguments += ["--set", "validation.decode_every=2", "--set", "validation.max_new_tokens=4"]
    assert run([*command, *arguments]) == 0, capsys.readouterr().err
    assert all(math.isfinite(step.loss or math.nan) for step in read(tmp_path / "run" / "metrics.jsonl"))
    facts = json.loads((tmp_path / "run" / "run.json").read_bytes())
    assert facts["config"]["capture"] == {"dtype": "float8_e4m3fn"}
    assert "acceptance_length" in (tmp_path / "run" / "validation.jsonl").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--set", "draft.mask_token_id=2"], 2, "it is the tokenizer's eos_token"),
        (["--set", "draft.num_taps=9"], 2, "taps"),
        (["--data", "missing.jsonl"], 1, "no data at 'missing.jsonl'"),
        (["--device", "cuda:9"], 2, "train.device"),
        (["--set", "data.batch_tokens=32"], 2, "batch_tokens"),
    ],
)
def test_what_the_run_would_refuse_is_refused(
    command: list[str], arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*command, *arguments, "--dry-run"]) == code
    assert said in capsys.readouterr().err


def test_a_target_has_to_be_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["-q", "train", "dflash", "--endpoint", f"ipc://{tmp_path}/none.sock", "--dry-run"]) == 2
    assert "no daemon serves one at ipc://" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"of x does not say 'hidden_size'.*leave --dry-run out"):
        contract_of("x", {"model_type": "x"}, "float32")
    nested: dict[str, Any] = {"text_config": {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9}}
    assert contract_of("x", nested, str(torch.float16).removeprefix("torch.")).dtype == "float16"
