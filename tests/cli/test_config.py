"""`specd config` and `--print-config`: what is printed reads back as the same, and docs/settings.md is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from specd.cli.config import page
from specd.cli.main import run
from specd.config.load import convert, load_yaml
from specd.config.presets import run_config
from specd.config.settings import DaemonConfig, RunConfig
from specd.drafts import registry
from specd.train.directory import RunFacts, write_facts

DOCS = Path(__file__).parents[2] / "docs"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["-q", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_the_settings_page_is_current() -> None:
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == page(), "specd config --reference > docs/settings.md"


@pytest.mark.parametrize("method", registry.BUILTIN)
@pytest.mark.parametrize("preset", ["", "Qwen3-8B"])
def test_what_is_printed_reads_back_as_the_same(
    method: str, preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, "config", "--method", method, *(["--preset", preset] if preset else ["--defaults"]))
    assert max(map(len, text.splitlines())) <= 84
    (tmp_path / "run.yaml").write_text(text)
    known = run_config({"method": method}, "", preset=preset)
    found = convert(load_yaml(tmp_path / "run.yaml"), RunConfig, "")
    assert (found.train, found.data, found.subscriber) == (known.train, known.data, known.subscriber)
    assert registry.settings(method, found.draft, "") == registry.settings(method, known.draft, "")
    again = printed(capsys, "train", method, "--config", str(tmp_path / "run.yaml"), "--print-config")
    assert again == text


def test_flags_are_in_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "Qwen3-8B", "--exact", "--max-steps", "7", "--set", "data.columns={prompt: q}", "-o", "x/y"]
    found = yaml.safe_load(printed(capsys, "train", "dflash", *arguments, "--print-config"))
    assert (found["train"]["max_steps"], found["output"], found["data"]["columns"]) == (7, "x/y", {"prompt": "q"})
    assert found["target"] == {"model": "Qwen3-8B", "exact": True}
    assert found["draft"]["mask_token_id"] > 0, "by the recipe of the target"
    assert not Path("x").exists()


def test_settings_of_a_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    found = yaml.safe_load(printed(capsys, "config", "--daemon", "--preset", "smollm2-135m"))
    assert convert(found, DaemonConfig, "").target.threads == 1
    assert (
        convert(yaml.safe_load(printed(capsys, "config", "--daemon", "--defaults")), DaemonConfig, "").ring.slots == 8
    )


def test_settings_of_a_run_begin_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"method": "eagle3", "output": "a", "train": {"lr": 0.5}, "target": {"model": "Qwen3-8B"}}
    facts = RunFacts(started="now", target={}, draft={}, data={}, transports={}, machine={}, config=config)
    write_facts(tmp_path, facts)
    assert yaml.safe_load(printed(capsys, "config", "--run", str(tmp_path)))["train"]["lr"] == 0.5
    text = printed(capsys, "train", "eagle3", "--config", str(tmp_path / "run.json"), "--print-config")
    found = yaml.safe_load(text)
    assert (found["train"]["lr"], found["target"], found["output"]) == (0.5, {"model": "Qwen3-8B"}, "")
    assert json.loads((tmp_path / "run.json").read_bytes())["config"] == config


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected one of --defaults, --preset NAME, --run RUN and --reference"),
        (["--defaults", "--preset", "Qwen3-8B"], "expected one of"),
        (["--preset", "qwen9"], "preset 'qwen9': expected one of"),
        (["--run", "x", "--daemon"], "a run does not know the settings of its daemon"),
        (["--run", "x", "--method", "eagle3"], "--method eagle3 with --run: a run has the draft that it trains"),
        (["--defaults", "--daemon", "--method", "eagle3"], "--method eagle3 with --daemon: "),
        (["--defaults", "--method", "eagle9"], "unknown draft method 'eagle9'"),
    ],
)
def test_wrong_questions(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", *arguments]) == 2
    assert said in capsys.readouterr().err
