"""The data commands read files as training does, and show what it will see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from chats import talk, write_rows, write_tokenizer
from specd.cli.data import app
from specd.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tokenizer(tmp_path_factory.mktemp("model"))
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 400, "max_position_embeddings": 512}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "cache"))


def run(*arguments: object, **options: Any) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_show_colours_the_labels(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "x")}, {"messages": talk("Hi", "Hello.")})
    shown = run("show", path, "--model", model, "--row", "2").output
    assert "\x1b[1;32mHello.<|im_end|>\x1b[0m" in shown
    assert "\x1b[2m<|im_start|>system\x1b[0m" in shown
    assert "labels" in shown
    assert "label" in shown.splitlines()[-2]


def test_show_says_why_a_row_is_left_out_or_cut(tmp_path: Path, model: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi")}, {"messages": talk("Hi", "Hello. " * 9)})
    assert "left out of training" in run("show", path, "--model", model).output
    shown = run("show", path, "--model", model, "--row", "2", "--set", "data.max_length=50").output
    assert "tokens cut" in shown
    assert "50 tokens" in shown
    with pytest.raises(DataError, match="has 2 rows, and no row 3"):
        run("show", path, "--model", model, "--row", "3")


def test_stats_count(tmp_path: Path, model: Path) -> None:
    rows = [{"messages": talk("Hi", "Hello. " * i), "form": "odd" if i % 2 else "even"} for i in range(1, 6)]
    path = write_rows(tmp_path / "a.jsonl", *rows, {"messages": talk("Hi")})
    counted = json.loads(run("stats", path, "--model", model, "--json").output)
    assert counted["report"]["rows"] == 6
    assert counted["report"]["samples"] == 5
    assert counted["report"]["without_labels"] == 1
    assert counted["report"]["forms"] == {"odd": 3, "even": 2}
    shown = run("stats", path, "--model", model).output
    assert "form odd" in shown
    assert "█" in shown
    assert f"{counted['report']['tokens']:,}" in shown


def test_stats_of_samples_that_are_all_alike(tmp_path: Path, model: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello.")})
    assert run("stats", path, "--model", model).exit_code == 0


def test_what_comes_with_specd_is_counted_where_nothing_names_data(model: Path) -> None:
    assert "specd:demo/train.jsonl" in run("stats", "--model", model).output


def test_wrong_settings_are_refused_by_name(tmp_path: Path, model: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi", "Hello.")})
    with pytest.raises(ConfigError, match="max_lenght"):
        run("stats", path, "--model", model, "--set", "data.max_lenght=3")
