"""`specd eval` end to end on a tiny target: options reach target and template, the exit code is the proof."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from chats import THINKING, talk, write_rows, write_tokenizer
from specd.cli.main import run
from specd.config.settings import RunConfig
from specd.drafts.dflash.export import save_draft
from specd.drafts.dflash.model import DFlashDraft, draft_shape
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
    save_draft(DFlashDraft(shape, 3), directory / "draft", dtype=torch.float32)
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


def test_dtype_is_the_targets(trained: Path, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--draft", str(trained), "--data", prompts, "--max-new-tokens", "4", "--json"]
    assert run([*arguments, "--dtype", "bfloat16", "--device", "cpu"]) == 0
    assert results(capsys.readouterr().out)["trained"].dtype == "bfloat16"
    assert run([*arguments, "--dtype", "int4"]) == 2
    assert "dtype 'int4'" in capsys.readouterr().err


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
