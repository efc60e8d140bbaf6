"""Regenerated answers are the target's own greedy ones, in input order, also after an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from chats import CHATML, talk, write_rows, write_tokenizer
from specd.data import regenerate as regeneration
from specd.data.chat import Chat
from specd.data.regenerate import Answer, FinishReason, Progress, generate, regenerate
from specd.data.tokenizer import load_tokenizer
from specd.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [
    {"messages": talk("What is the tone of this message? " * (i % 3) + "Hi" * i, "an old answer"), "form": f"f{i}"}
    for i in range(1, 8)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


def greedy(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """One prompt alone, without padding or cache."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    written: list[int] = []
    while len(written) < max_new_tokens:
        with torch.inference_mode():
            token = int(model(torch.tensor([ids + written])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    return str(tokenizer.decode(written, skip_special_tokens=True))


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_answers_are_the_targets_own_in_input_order(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", *ROWS), tmp_path / "new" / "out.jsonl"
    seen: list[Progress] = []
    done = regenerate(
        model, tokenizer, source, out, target="tiny", max_new_tokens=9, batch_size=3, on_batch=seen.append
    )
    chat = Chat(tokenizer)
    rows = lines(out)
    for asked, row in zip(ROWS, rows, strict=True):
        prompt = chat.render(asked["messages"][:1], open_answer=True)
        answer = {"role": "assistant", "content": greedy(model, tokenizer, prompt, 9)}
        reason = row["messages"][1].pop("finish_reason")
        assert reason in ("stop", "length")
        assert row["messages"] == [asked["messages"][0], answer]
        assert row["form"] == asked["form"]
    assert [progress.samples for progress in seen] == [3, 6, 7]
    assert done.samples == done.total == 7
    assert [file.name for file in out.parent.iterdir()] == ["out.jsonl"]


def test_an_interrupted_call_goes_on_and_gives_the_same_file(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    source = write_rows(tmp_path / "in.jsonl", *ROWS)
    options: dict[str, Any] = {"target": "tiny", "max_new_tokens": 6, "batch_size": 2}
    regenerate(model, tokenizer, source, tmp_path / "whole.jsonl", **options)

    def stop(progress: Progress) -> None:
        if progress.samples == 4:
            raise KeyboardInterrupt

    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        regenerate(model, tokenizer, source, out, **options, on_batch=stop)
    assert not out.exists()
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-9])  # the second batch was being written
    seen: list[Progress] = []
    regenerate(model, tokenizer, source, out, **options, on_batch=seen.append)
    assert [progress.samples for progress in seen] == [4, 6, 7]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_unfinished_work_of_another_call_is_not_mixed_in(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", *ROWS), tmp_path / "out.jsonl"

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regenerate(model, tokenizer, source, out, target="tiny", max_new_tokens=4, batch_size=2, on_batch=stop)
    with pytest.raises(ConfigError, match=r"unfinished work of another regeneration"):
        regenerate(model, tokenizer, source, out, target="tiny", max_new_tokens=5, batch_size=2)
    out.write_text("")
    with pytest.raises(ConfigError, match="exists already"):
        regenerate(model, tokenizer, source, out, target="tiny")


def test_every_turn_is_answered_from_the_new_answers(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rows = [
        {"messages": talk("Hi", "old", "And?", "old", "So?")},
        {"conversations": [{"from": "human", "value": "Hi"}]},
    ]
    source, out = write_rows(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    regenerate(model, tokenizer, source, out, target="tiny", max_new_tokens=5, batch_size=2)
    chat = Chat(tokenizer)
    first, second = lines(out)
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"] * 3
    for turn in (1, 3, 5):
        prompt = chat.render(first["messages"][:turn], open_answer=True)
        assert first["messages"][turn]["content"] == greedy(model, tokenizer, prompt, 5)
    assert sorted(second) == ["messages"]


def test_each_answer_says_whether_it_was_cut(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer of two is cut: training must not read an end of turn after it."""
    reasons: Iterator[FinishReason] = iter(("length", "stop"))

    def answer(_: Any, __: Any, prompts: list[str], *, max_new_tokens: int) -> list[Answer]:
        return [Answer(text="Well, and", num_tokens=max_new_tokens, finish_reason=next(reasons)) for _ in prompts]

    monkeypatch.setattr(regeneration, "generate", answer)
    source, out = write_rows(tmp_path / "in.jsonl", {"messages": talk("Hi", "old", "And?")}), tmp_path / "out.jsonl"
    regenerate(model, tokenizer, source, out, target="tiny", max_new_tokens=5)
    (row,) = lines(out)
    assert [turn.get("finish_reason") for turn in row["messages"]] == [None, "length", None, "stop"]
    rendered = Chat(tokenizer).conversation(row, "row 1")
    assert [rendered.text[begin:end] for begin, end in rendered.spans] == ["Well, and", "Well, and<|im_end|>"]


def test_finish_reason_says_whether_the_answer_ended(model: Any, tokenizer: Any) -> None:
    prompt = Chat(tokenizer).render(talk("Hi"), open_answer=True)
    (cut,) = generate(model, tokenizer, [prompt], max_new_tokens=4)
    assert (cut.finish_reason, cut.num_tokens) == ("length", 4)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    kept = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [kept, token]
    try:
        (ended,) = generate(model, tokenizer, [prompt], max_new_tokens=4)
    finally:
        model.generation_config.eos_token_id = kept
    assert (ended.text, ended.finish_reason, ended.num_tokens) == ("", "stop", 1)


def test_too_long_for_the_target(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"and 600 new ones exceed the target's 512 positions"):
        generate(model, tokenizer, ["Hi"], max_new_tokens=600)


def test_bad_rows_are_named_before_the_target_works(tmp_path: Path, tokenizer: Any) -> None:
    source = write_rows(tmp_path / "in.jsonl", *ROWS, {"messages": [{"role": "system", "content": "Be brief."}]})
    with pytest.raises(DataError, match=r"in\.jsonl line 8: no user turn to answer"):
        regenerate(None, tokenizer, source, tmp_path / "out.jsonl", target="tiny")  # type: ignore[arg-type]


def test_a_conversation_the_template_refuses_is_named(tmp_path: Path) -> None:
    strict = "{% if messages[0].content == 'x' %}{{ 1 / 0 }}{% endif %}" + CHATML
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "strict", strict))
    source = write_rows(tmp_path / "in.jsonl", {"messages": talk("Hi")}, {"messages": talk("x")})
    with pytest.raises(DataError, match=r"in\.jsonl line 2: the chat template refuses it: division by zero"):
        regenerate(None, tokenizer, source, tmp_path / "out.jsonl", target="tiny")  # type: ignore[arg-type]
