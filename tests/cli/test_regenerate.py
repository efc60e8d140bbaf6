"""`specd data regenerate`: files are read as training reads them, answers are written once, here or by a server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from chat_server import ChatServer, Said, failed, said
from chats import consist_of_code, talk, write_rows, write_target, write_tokenizer
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
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def run(*arguments: object, **options: Any) -> Result:
    result = CliRunner().invoke(app, ["regenerate", *map(str, arguments)], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answers(out: Path) -> list[str]:
    return [json.loads(line)["messages"][-1]["content"] for line in out.read_text(encoding="utf-8").splitlines()]


def echo(request: dict[str, Any]) -> Said:
    return said(f"to {request['messages'][-1]['content']}")


def test_answers_are_written_once(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from specd.targets.transformers import load

    tokenizer = load.load_tokenizer(str(model))
    network, _ = load.load_causal_lm(str(model), load_format="dummy")
    monkeypatch.setattr(load, "load_causal_lm", lambda *_, **__: (network, tokenizer))
    prompts = write_rows(tmp_path / "a.jsonl", *({"messages": talk(f"Hi {i}", "old")} for i in range(3)))
    out = tmp_path / "out.jsonl"
    arguments = ("--model", model, "--prompts", prompts, "--output", out, "--max-new-tokens", "3")
    assert "2 answered" in run(*arguments, "--max-samples", "2").output
    assert len(out.read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match="--overwrite"):
        run(*arguments)
    run(*arguments, "--overwrite")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["Hi 0", "Hi 1", "Hi 2"]
    assert "old" not in {row["messages"][1]["content"] for row in rows}


def test_a_day_that_the_template_is_told_is_kept_by_unfinished_work(tmp_path: Path) -> None:
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    template += (
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    model = write_target(tmp_path / "dated", template=template)
    prompts, out = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi")}, {"messages": talk("Ho")}), tmp_path / "o"
    arguments = (prompts, "--model", model, "--output", out, "--max-new-tokens", 4, "--batch-size", 1)
    run(*arguments, "--set", "data.date=2020-02-02")
    whole = out.read_bytes()
    out.unlink()
    settings = {"target": str(model), "batch_size": 1, "template": {}, "max_new_tokens": 4, "temperature": 0.0}
    settings |= {"top_p": 1.0, "seed": 0, "date": "2020-02-02"}
    (tmp_path / "o.partial").write_text(json.dumps(settings) + "\n")
    run(*arguments)
    assert out.read_bytes() == whole


def test_code_of_a_target_is_run_when_asked_for(tmp_path: Path) -> None:
    model, prompts = write_target(tmp_path / "own"), write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi")})
    consist_of_code(model)
    arguments = (prompts, "--model", model, "--output", tmp_path / "out.jsonl", "--max-new-tokens", 2)
    with pytest.raises(ConfigError, match="is not run unasked; read it, and give --trust-remote-code"):
        run(*arguments)
    assert "1 answered" in run(*arguments, "--trust-remote-code").output


def test_a_server_is_asked_with_the_key_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame\n")
    prompts, out = write_rows(tmp_path / "a.jsonl", *({"prompt": f"Q{i}?"} for i in range(5))), tmp_path / "out.jsonl"
    with ChatServer(echo) as server:
        flags: list[object] = ["--temperature", 0.5, "--top-p", 0.9, "--seed", 3, "--max-new-tokens", 40]
        flags += ["--extra", "top_k=20", "--set", "data.template.enable_thinking=false", "--concurrency", 2]
        done = run(prompts, "--model", "Qwen/Qwen3-8B", "--endpoint", server.url, "--output", out, *flags)
        assert server.headers[-1]["Authorization"] == "Bearer sesame"
        asked = server.requests[-1]
    assert "5 answered, 15 tokens" in done.output
    assert "sesame" not in done.output
    assert answers(out) == [f"to Q{i}?" for i in range(5)]
    assert {name: asked[name] for name in ("model", "temperature", "top_p", "seed", "max_tokens", "top_k")} == {
        "model": "Qwen/Qwen3-8B", "temperature": 0.5, "top_p": 0.9, "seed": 3, "max_tokens": 40, "top_k": 20,
    }  # fmt: skip
    assert asked["chat_template_kwargs"] == {"enable_thinking": False}


def test_rows_left_out_are_reported(tmp_path: Path) -> None:
    def script(request: dict[str, Any]) -> Said:
        return failed(400, "too long") if "long" in request["messages"][-1]["content"] else echo(request)

    rows: list[dict[str, Any]] = [{"prompt": "Q0?"}, {"prompt": "a long one"}, {"odd": 1}]
    prompts, out = write_rows(tmp_path / "a.jsonl", *rows), tmp_path / "out.jsonl"
    with ChatServer(script) as server:
        arguments = (prompts, "--model", "tiny", "--endpoint", server.url, "--output", out)
        with pytest.raises(DataError, match="1 of 3 rows cannot be used"):
            run(*arguments)
        assert server.probes == []
        done = run(*arguments, "--set", "data.bad_rows=skip")
    assert "1 left out, unknown columns, the first: a.jsonl line 3" in done.output
    assert (
        "1 left out, refused by the server, the first: a.jsonl line 2: the server answers 400: too long" in done.output
    )
    assert answers(out) == ["to Q0?"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--extra", "top_k=20"), "give --endpoint"),
        (("--endpoint", "http://h/v1", "--extra", "top_k"), "expected KEY=JSON"),
        (("--endpoint", "http://h/v1", "--extra", "stop=END"), "expected KEY=JSON"),
        (("--endpoint", "localhost:8000"), "expected http://host:port/v1"),
        (("--endpoint", "http://h/v1", "--set", "data.columns.odd=x"), "data.columns maps 'odd'"),
    ],
)
def test_wrong_flags_are_named(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    prompts = write_rows(tmp_path / "a.jsonl", {"messages": talk("Hi")})
    with pytest.raises(ConfigError, match=message):
        run(prompts, "--model", "tiny", "--output", tmp_path / "out.jsonl", *flags)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_the_target_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model"):
        run("--output", tmp_path / "out.jsonl")


def test_ctrl_c_says_how_to_go_on_and_the_command_resumes(tmp_path: Path) -> None:
    """Ctrl-C while the third answer is awaited; the others are kept."""
    prompts, out = write_rows(tmp_path / "a.jsonl", *({"prompt": f"Q{i}?"} for i in range(3))), tmp_path / "out.jsonl"

    def script(request: dict[str, Any]) -> Said:
        if request["messages"][-1]["content"] == "Q2?" and not server.closing.is_set():
            process.send_signal(signal.SIGINT)
            server.closing.wait(60)
        return echo(request)

    with ChatServer(script) as server:
        command = [
            sys.executable,
            "-m",
            "specd",
            "data",
            "regenerate",
            prompts,
            "--model",
            "tiny",
            "--output",
            str(out),
        ]
        command += ["--endpoint", server.url, "--concurrency", "1"]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
        ) as process:
            _, said_last = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "give the same command again to resume" in said_last
        assert "Traceback" not in said_last
    with ChatServer(echo) as again:
        run(prompts, "--model", "tiny", "--output", out, "--endpoint", again.url)
        assert len(again.requests) == 1
    assert answers(out) == ["to Q0?", "to Q1?", "to Q2?"]
