"""`specd data regenerate`: files are read as training reads them, answers are written once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from chats import talk, write_rows, write_tokenizer
from specd.cli.data import app
from specd.errors import ConfigError


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


def test_regenerate_writes_answers_once(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specd.targets.transformers import load

    tokenizer = load.load_tokenizer(str(model))
    network, _ = load.load_causal_lm(str(model), load_format="dummy")
    monkeypatch.setattr(load, "load_causal_lm", lambda *_, **__: (network, tokenizer))
    prompts = write_rows(tmp_path / "a.jsonl", *({"messages": talk(f"Hi {i}", "old")} for i in range(3)))
    out = tmp_path / "out.jsonl"
    arguments = ("regenerate", "--model", model, "--prompts", prompts, "--output", out, "--max-new-tokens", "3")
    assert "2 answered" in run(*arguments, "--max-samples", "2").output
    assert len(out.read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match="--overwrite"):
        run(*arguments)
    run(*arguments, "--overwrite")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["Hi 0", "Hi 1", "Hi 2"]
    assert "old" not in {row["messages"][1]["content"] for row in rows}


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specd.data import regenerate
    from specd.targets.transformers import load

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(load, "load_causal_lm", lambda *_, **__: ("model", "tokenizer"))
    monkeypatch.setattr(regenerate, "regenerate", interrupt)
    prompts = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi")})
    result = run("regenerate", "--model", model, "--prompts", prompts, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 130
    assert "give the same command again" in result.output
