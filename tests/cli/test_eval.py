"""`specd eval` end to end on a tiny target: options reach target and template, the exit code is the proof."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from chats import THINKING, consist_of_code, talk, write_rows, write_target, write_tokenizer
from drafts import save_draft
from specd.cli.main import run
from specd.config.settings import RunConfig
from specd.drafts.backbone.network import Backbone
from specd.drafts.backbone.shape import draft_shape
from specd.drafts.dflash.settings import DFlashConfig
from specd.evaluate import decode
from specd.evaluate.decode import Generation
from specd.evaluate.results import EVALS, EvalFacts
from specd.targets.transformers import load
from specd.train.directory import RunFacts, write_facts

LAYERS: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
SILENT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of random weights whose generation config names no end of a text; its tokenizer does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = write_tokenizer(tmp_path_factory.mktemp("model"), THINKING)
    config = LlamaConfig(
        vocab_size=400, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.25,
        eos_token_id=None, bos_token_id=None, **LAYERS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)  # type: ignore[no-untyped-call]
    return directory


@pytest.fixture
def trained(tmp_path: Path, model: Path) -> Path:
    """A run whose data had `enable_thinking` off, with its draft."""
    config = DFlashConfig(num_layers=1, block_size=4, mask_token_id=0)
    shape = draft_shape(config, json.loads((model / "config.json").read_text()), (1, 2))
    directory = tmp_path / "run"
    directory.mkdir()
    save_draft(Backbone(shape, 3), directory / "draft", dtype=torch.float32)
    settings = msgspec.to_builtins(RunConfig(method="dflash"))
    settings["data"]["template"] = {"enable_thinking": False}
    facts = RunFacts(
        started="now", target={"model": str(model)}, draft={}, data={}, transports={}, machine={}, config=settings
    )
    write_facts(directory, facts)
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write_rows(tmp_path / "asked.jsonl", {"messages": talk("Hi", "Hello.")}, {"messages": talk("And you?")})


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The command that training prints at its end, after a step on a target in a folder called like a preset."""
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "cache"))
    write_target(tmp_path / "my models" / "Qwen3-8B", num_layers=6)
    monkeypatch.chdir(tmp_path / "my models")
    data = write_rows(tmp_path / "rows.jsonl", *({"messages": talk("Hi", f"Hello {i}.")} for i in range(4)))
    small = ("num_layers=1", "num_taps=2", "block_size=4", "num_anchors=4", "mask_token_id=9")
    settings = [*(f"draft.{one}" for one in small), "data.max_length=256", "data.batch_tokens=256", "train.threads=1"]
    arguments = ["--model", "./Qwen3-8B", "--data", data, "--output", str(tmp_path / "my run"), "--max-steps", "1"]
    assert run(["train", "dflash", *arguments, "--device", "cpu", *(f"--set={one}" for one in settings)]) == 0
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next:")]
    command = command.removeprefix("next:").strip()
    monkeypatch.chdir(tmp_path)
    return [*shlex.split(command)[1:], "--device", "cpu", "--dtype", "float32", "--limit", "2", "--max-new-tokens", "4"]


def results(text: str) -> dict[str, EvalFacts]:
    return msgspec.json.decode(text, type=dict[str, EvalFacts])


def test_both_drafts_are_proved_and_kept_with_the_run(
    trained: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", "--draft", str(trained), "--data", prompts, "--max-new-tokens", "8", "--untrained"]
    assert run([*arguments, "--dtype", "float32", "--device", "cpu", "--json"]) == 0
    found = results(capsys.readouterr().out)
    for name, facts in found.items():
        assert (facts.identical, facts.prompts, facts.source, facts.dtype) == (2, 2, prompts, "float32")
        assert msgspec.json.decode((trained / EVALS[name]).read_bytes(), type=EvalFacts) == facts
    assert found["trained"].texts == found["untrained"].texts


def test_figures_that_cannot_be_kept_are_shown_all_the_same(
    trained: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (trained / EVALS["trained"]).mkdir()
    arguments = ["eval", "--draft", str(trained), "--data", prompts, "--max-new-tokens", "4", "--device", "cpu"]
    assert run(arguments) == 1
    captured = capsys.readouterr()
    assert "identical trained: 2 of 2" in captured.out
    assert f"cannot write {trained / EVALS['trained']}" in captured.err


def test_dtype_is_the_targets(trained: Path, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--draft", str(trained), "--data", prompts, "--max-new-tokens", "4", "--json"]
    assert run([*arguments, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert results(capsys.readouterr().out)["trained"].dtype == "bfloat16"
    assert run([*arguments, "--dtype", "int4"]) == 2
    assert "dtype 'int4'" in capsys.readouterr().err


def test_what_training_prints_works_by_the_letter_and_on_no_other_target(
    tmp_path: Path, printed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    own, figures = tmp_path / "my models" / "Qwen3-8B", tmp_path / "my run" / EVALS["trained"]
    assert run([*printed, "--json"]) == 0
    found = results(capsys.readouterr().out)
    assert {(facts.model, facts.identical) for facts in found.values()} == {(str(own), 2)}
    assert found["trained"] == msgspec.json.decode(figures.read_bytes(), type=EvalFacts)
    figures.unlink()

    shutil.copytree(own, tmp_path / "tuned")
    weights = load_file(tmp_path / "tuned" / "model.safetensors")
    save_file({name: weight + 0.01 for name, weight in weights.items()}, tmp_path / "tuned" / "model.safetensors")
    assert run([*printed, "--model", str(tmp_path / "tuned")]) == 2
    said = capsys.readouterr().err
    assert f"target '{tmp_path}/tuned' is not the one that {tmp_path}/my run was trained on: weights " in said
    assert not figures.exists()
    assert run([*printed, "--model", str(tmp_path / "tuned"), "--other-target"]) == 0
    assert "not kept with" in capsys.readouterr().out
    assert not figures.exists()

    template = own / "chat_template.jinja"
    before = template.read_text()
    template.write_text(THINKING)
    assert run(printed) == 2, "it takes the place of the run's"
    assert "was trained on: chat template " in capsys.readouterr().err
    template.write_text(before)

    own.rename(tmp_path / "moved")
    assert run(printed) == 2
    assert f"'{own}', is no directory of this machine" in capsys.readouterr().err
    assert run([*printed, "--model", str(tmp_path / "moved")]) == 0
    assert figures.exists()


def test_a_target_without_a_chat_template_goes_on_with_prompts(
    tmp_path: Path, trained: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    rows: list[dict[str, Any]] = [
        {"prompt": "Once"},
        {"text": "Upon a time"},
        {"messages": [{"role": "robot", "content": "x"}]},
    ]
    file = write_rows(tmp_path / "plain.jsonl", *rows)
    (tmp_path / "story.txt").write_text("There was")
    arguments = ["eval", "--draft", str(trained), "--model", str(tmp_path / "base"), "--device", "cpu"]
    arguments += ["--data", file, "--data", str(tmp_path / "story.txt"), "--max-new-tokens", "4"]
    assert run(arguments) == 1
    assert "1 of 4 rows cannot be used" in capsys.readouterr().err
    assert run([*arguments, "--set", "data.bad_rows=skip", "--json"]) == 0
    found = results(capsys.readouterr().out)["trained"]
    assert (found.prompts, found.identical, [fault.rows for fault in found.bad]) == (3, 3, [1])
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*arguments, "--set", "data.bad_rows=skip"]) == 0
    assert "left out 1 rows: unknown role; the first: plain.jsonl line 3: " in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_a_target_without_a_tokenizer_takes_that_of_a_directory(
    tmp_path: Path, trained: Path, model: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, tmp_path / "bare")
    arguments = ["eval", "--draft", str(trained), "--model", str(tmp_path / "bare"), "--data", prompts]
    assert run([*arguments, "--device", "cpu"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    assert run([*arguments, "--device", "cpu", "--tokenizer", str(model), "--max-new-tokens", "4"]) == 0


def test_code_of_a_target_is_run_when_asked_for(
    tmp_path: Path, trained: Path, model: Path, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "own")
    consist_of_code(tmp_path / "own")
    arguments = ["eval", str(trained), "--model", f"{tmp_path}/own", "--data", prompts, "--device", "cpu"]
    arguments += ["--max-new-tokens", "2", "--limit", "1"]
    assert run(arguments) == 2
    assert "is not run unasked; read it, and give --trust-remote-code" in capsys.readouterr().err
    assert run([*arguments, "--trust-remote-code"]) == 0


@pytest.mark.parametrize("settings", [[], ["data.template.enable_thinking=true"]])
@pytest.mark.parametrize("in_run", [True, False])
def test_the_template_gets_the_options_of_the_run_or_those_given(
    trained: Path, model: Path, prompts: str, settings: list[str], in_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ends: list[Any] = []
    tokenizer: Any = load.load_tokenizer(str(model))

    def greedy(_: Any, prompt: list[int], *, max_new_tokens: int, eos: Any) -> Generation:
        asked.append(tokenizer.decode(prompt))
        ends.append(list(eos))
        raise KeyboardInterrupt

    monkeypatch.setattr("specd.evaluate.evaluator.greedy", greedy)
    if not in_run:
        (trained / "run.json").unlink()
    arguments = ["eval", "--draft", str(trained), "--model", str(model), "--data", prompts, "--device", "cpu"]
    assert run([*arguments, *(text for setting in settings for text in ("--set", setting))]) == 130
    assert [text.endswith(SILENT) for text in asked] == [in_run and not settings]
    assert ends == [[tokenizer.eos_token_id]], "the generation config names no end, the tokenizer does"


@pytest.mark.parametrize(("rounding", "code", "word"), [(1e9, 0, "identical but for ties"), (0.0, 1, "DIFFERENT")])
def test_only_what_no_rounding_explains_is_a_failure(
    trained: Path, prompts: str, rounding: float, code: int, word: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The same wrong text: a fault for a target that rounds finely, a tie for one that would round that much."""
    true = decode.greedy

    def forged(*arguments: Any, **limits: Any) -> Generation:
        text = true(*arguments, **limits)
        return msgspec.structs.replace(text, tokens=((text.tokens[0] + 1) % 400, *text.tokens[1:]))

    monkeypatch.setattr("specd.evaluate.evaluator.greedy", forged)
    monkeypatch.setattr(decode, "ROUNDINGS", rounding)
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["eval", "--draft", str(trained), "--data", prompts, "--max-new-tokens", "4", "--limit", "1"]
    assert run([*arguments, "--device", "cpu", "--dtype", "float32"]) == code
    shown = capsys.readouterr().out
    assert f"{word} trained: 0 of 1 outputs equal" in shown
    assert "1 part at a tie" in shown if code == 0 else "1 differ" in shown


def test_wrong_settings_are_refused_by_name(trained: Path, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--draft", str(trained), "--data", prompts]
    for setting in ("data.tempalte.x=1", "data.max_samples=5"):
        assert run([*arguments, "--set", setting]) == 2
        said = f"--set {setting}: evaluation takes what prompts are read by: data.template, data.date, data.columns,"
        assert said in capsys.readouterr().err
