"""Answers in this process are the target's own, to the token, whatever they hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from chats import CHATML, talk, write_rows, write_tokenizer
from specd.config.settings import DataConfig
from specd.data import forms
from specd.data.chat import Chat
from specd.data.regenerate import local
from specd.data.regenerate.job import Progress, Sampling, regenerate
from specd.data.regenerate.local import Local, Written, generate
from specd.data.tokenizer import Encoder, load_tokenizer
from specd.errors import ConfigError, DataError

ROWS: list[dict[str, Any]] = [
    {"messages": talk("What is the tone of this message? " * (i % 3) + "Hi" * i, "an old answer"), "form": f"f{i}"}
    for i in range(1, 8)
]
POSITIONS = 512


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return tiny(len(tokenizer), tokenizer.eos_token_id)


def tiny(vocab_size: int, eos_token_id: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=POSITIONS,
            initializer_range=0.5,
            eos_token_id=eos_token_id,
        )
        return LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


class Writer:
    """A target that writes given tokens: the n-th answer to each of its prompts."""

    device = "cpu"
    generation_config = None

    def __init__(self, *answers: list[int], positions: int = POSITIONS) -> None:
        self.answers = list(answers)
        self.config = self
        self.max_position_embeddings = positions

    def get_text_config(self) -> Writer:
        return self

    def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([self.answers.pop(0)] * len(input_ids))], 1)


def greedy(model: Any, tokenizer: Any, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """One prompt alone, without padding or cache."""
    written: list[int] = []
    while len(written) < max_new_tokens and tokenizer.eos_token_id not in written:
        with torch.inference_mode():
            written.append(int(model(torch.tensor([[*prompt, *written]])).logits[0, -1].argmax()))
    return written


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def trained(row: dict[str, Any], tokenizer: Any) -> list[int]:
    """The labels that training makes of a row."""
    form = forms.read(row, "row", DataConfig())
    if isinstance(form, forms.Tokens):
        return [int(token) for token in form.ids[form.loss_mask]]
    assert isinstance(form, forms.Conversation)
    ((tokens, mask),) = Encoder(tokenizer).encode([Chat(tokenizer).conversation(form, "row")])
    return [int(token) for token in tokens[mask]]


def answered(tmp_path: Path, answerer: Local, *rows: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    config = DataConfig(path=write_rows(tmp_path / "in.jsonl", *rows), **options)
    regenerate(config, answerer, tmp_path / "out.jsonl")
    return lines(tmp_path / "out.jsonl")


def test_answers_are_the_targets_own_in_input_order(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    config = DataConfig(path=write_rows(tmp_path / "in.jsonl", *ROWS))
    out = tmp_path / "new" / "out.jsonl"
    seen: list[Progress] = []
    answerer = Local(model, tokenizer, Sampling(max_new_tokens=9), target="tiny", batch_size=3)
    done = regenerate(config, answerer, out, on_answer=seen.append)
    chat = Chat(tokenizer)
    for asked, row in zip(ROWS, lines(out), strict=True):
        prompt = tokenizer(chat.render(asked["messages"][:1], open_answer=True), add_special_tokens=False)["input_ids"]
        written = greedy(model, tokenizer, prompt, 9)
        assert trained(row, tokenizer) == written
        ended = written[-1] == tokenizer.eos_token_id
        assert row["messages"][1]["finish_reason"] == ("stop" if ended else "length")
        assert row["messages"][1]["content"] == tokenizer.decode(written[: -1 if ended else None])
        assert row["messages"][0] == asked["messages"][0]
        assert row["form"] == asked["form"]
    assert [progress.samples for progress in seen] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert done.samples == done.total == 7
    assert [file.name for file in out.parent.iterdir()] == ["out.jsonl"]


def test_an_interrupted_call_goes_on_and_gives_the_same_file(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    config = DataConfig(path=write_rows(tmp_path / "in.jsonl", *ROWS))

    def answerer() -> Local:
        return Local(model, tokenizer, Sampling(max_new_tokens=6), target="tiny", batch_size=2)

    regenerate(config, answerer(), tmp_path / "whole.jsonl")

    def stop(progress: Progress) -> None:
        if progress.samples == 4:
            raise KeyboardInterrupt

    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        regenerate(config, answerer(), out, on_answer=stop)
    assert not out.exists()
    partial = tmp_path / "out.jsonl.partial"
    partial.write_bytes(partial.read_bytes()[:-9])  # the fourth answer was being written
    seen: list[Progress] = []
    regenerate(config, answerer(), out, on_answer=seen.append)
    assert [progress.samples for progress in seen] == [3, 4, 5, 6, 7]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()


def test_every_turn_is_answered_from_the_new_answers(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": talk("Hi", "old", "And?", "old", "So?")},
        {"conversations": [{"from": "human", "value": "Hi"}], "finish_reason": "length"},
    ]
    answerer = Local(model, tokenizer, Sampling(max_new_tokens=5), target="tiny", batch_size=2)
    first, second = answered(tmp_path, answerer, *rows)
    assert [turn["role"] for turn in first["messages"]] == ["user", "assistant"] * 3
    chat = Chat(tokenizer)
    for turn in (1, 3, 5):
        prompt = chat.render(first["messages"][:turn], open_answer=True)
        written = greedy(model, tokenizer, tokenizer(prompt, add_special_tokens=False)["input_ids"], 5)
        ended = written[-1] == tokenizer.eos_token_id
        assert first["messages"][turn]["content"] == tokenizer.decode(written[: -1 if ended else None])
    assert set(second) - {"input_ids", "loss_mask"} == {"messages"}


@pytest.mark.parametrize(
    "text", ["Rain.", " Rain. ", "[TOOL] {}", "<|im_start|>think\nno", "<think>\nHm\n</think>\n\nYes"]
)
def test_special_tokens_of_an_answer_are_trained_as_they_were_written(
    tmp_path: Path, tokenizer: Any, text: str
) -> None:
    written = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    (row,) = answered(tmp_path, Local(Writer(written), tokenizer, Sampling(), target="w"), {"messages": talk("Hi")})  # type: ignore[arg-type]
    assert row["messages"][1] == {"role": "assistant", "content": text, "finish_reason": "stop"}
    assert trained(row, tokenizer) == written
    assert "input_ids" not in row  # the text is enough


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_token_ids_are_kept_where_the_text_would_be_trained_otherwise(tmp_path: Path, tokenizer: Any, end: str) -> None:
    """`Yes` in three tokens, as no tokenizer writes it, and an end that the template does not write."""
    letters = tokenizer.convert_tokens_to_ids(["Y", "e", "s"])
    tokenizer_ids = tokenizer("message", add_special_tokens=False)["input_ids"]
    spelled = [token for letter in "message" for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    assert spelled != tokenizer_ids
    written = [*letters, *spelled, tokenizer.convert_tokens_to_ids(end)]
    target: Any = Writer(written)
    target.generation_config = type("Settings", (), {"eos_token_id": written[-1]})
    (row,) = answered(tmp_path, Local(target, tokenizer, Sampling(), target="w"), {"messages": talk("Hi")})
    assert row["messages"][1]["content"] == "Yesmessage"
    assert trained(row, tokenizer) == written
    prompt = Chat(tokenizer).render(talk("Hi"), open_answer=True)
    assert row["input_ids"] == tokenizer(prompt, add_special_tokens=False)["input_ids"] + written


def test_a_template_that_refuses_what_was_written_leaves_the_tokens(tmp_path: Path) -> None:
    """As gpt-oss's template does with channels in a content: the next turn cannot be asked."""
    strict = "{% if '<|im_start|>' in messages[-1].content %}{{ raise_exception('tags in a content') }}{% endif %}"
    strict += "{% if '<|im_start|>' in messages[1:2] | map(attribute='content') | join %}{{ 1 / 0 }}{% endif %}"
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "strict", strict + CHATML))
    written = [*tokenizer("<|im_start|>final Blue.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    answerer = Local(Writer(written), tokenizer, Sampling(), target="w")  # type: ignore[arg-type]
    (row,) = answered(tmp_path, answerer, {"messages": talk("Sky?", "x", "Sea?")})
    assert [turn["content"] for turn in row["messages"]] == ["Sky?", "<|im_start|>final Blue."]
    assert trained(row, tokenizer) == written


def test_each_answer_says_whether_it_was_cut(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer of two is cut: training must not read an end of turn after it."""
    text = tokenizer("Well, and", add_special_tokens=False)["input_ids"]
    answers = iter([Written(ids=text, finish_reason="length"), Written(ids=[*text, 2], finish_reason="stop")])
    monkeypatch.setattr(local, "generate", lambda *_: [next(answers)])
    answerer = Local(Writer(), tokenizer, Sampling(max_new_tokens=5), target="tiny")  # type: ignore[arg-type]
    (row,) = answered(tmp_path, answerer, {"messages": talk("Hi", "old", "And?")})
    assert [turn.get("finish_reason") for turn in row["messages"]] == [None, "length", None, "stop"]
    assert trained(row, tokenizer) == [*text, *text, 2]


def test_an_answer_ends_at_any_end_token_or_its_own_limit(model: Any, tokenizer: Any) -> None:
    short, long = ([1, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in ("Hi", "What is the tone?"))
    stops = [tokenizer.eos_token_id]
    first, second = generate(model, [short, long], [3, 7], stops, Sampling())
    assert (len(first.ids), first.finish_reason) == (3, "length")
    assert first.ids == greedy(model, tokenizer, short, 3)
    assert second.ids == greedy(model, tokenizer, long, 7)
    (ended,) = generate(model, [long], [7], [*stops, second.ids[2]], Sampling())
    assert (ended.ids, ended.finish_reason) == (second.ids[:3], "stop")


def test_an_answer_may_fill_the_targets_positions(tmp_path: Path, tokenizer: Any) -> None:
    """Without a limit of its own an answer ends where the target does."""
    target = tiny(len(tokenizer), tokenizer.eos_token_id)
    target.config.max_position_embeddings = 40
    target.generation_config.eos_token_id = None
    tokens = Chat(tokenizer).render(talk("Hi"), open_answer=True)
    prompt = tokenizer(tokens, add_special_tokens=False)["input_ids"]
    answerer = Local(target, tokenizer, Sampling(), target="tiny")
    (row,) = answered(tmp_path, answerer, {"messages": talk("Hi")})
    assert len(prompt) + len(greedy(target, tokenizer, prompt, 40 - len(prompt))) <= 40
    assert trained(row, tokenizer) == greedy(target, tokenizer, prompt, 40 - len(prompt))


def test_samples_are_the_same_for_the_same_seed(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer("What is the tone?", add_special_tokens=False)["input_ids"]
    stops = [tokenizer.eos_token_id]
    before = torch.random.get_rng_state()
    found = [generate(model, [prompt], [12], stops, Sampling(temperature=2.0, seed=seed))[0].ids for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_batch_that_does_not_fit_into_memory_is_halved(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def scarce(model: Any, prompts: Sequence[Any], *rest: Any) -> list[Written]:
        sizes.append(len(prompts))
        if len(prompts) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(model, prompts, *rest)

    monkeypatch.setattr(local, "generate", scarce)
    answerer = Local(model, tokenizer, Sampling(max_new_tokens=2), target="tiny", batch_size=4)
    room = 2
    assert len(answered(tmp_path, answerer, *ROWS[:4])) == 4
    assert sizes == [4, 2, 2]
    room = 0
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(ConfigError, match="give a lower --max-new-tokens"):
        answered(tmp_path, answerer, *ROWS[:1])


def test_prompts_too_long_are_known_before_the_target_works(tmp_path: Path, tokenizer: Any) -> None:
    answerer = Local(Writer(), tokenizer, Sampling(), target="tiny")  # type: ignore[arg-type]  # writes nothing
    rows = [*ROWS, {"messages": talk("word " * POSITIONS)}]
    with pytest.raises(DataError, match=r"1 of 8 rows .*\n.*too long for the target.*in\.jsonl line 8: its prompt of"):
        answered(tmp_path, answerer, *rows)
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_without_the_long_row_the_kept_work_is_used(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    def stop(progress: Progress) -> None:
        if progress.samples == 5:
            raise KeyboardInterrupt

    answerer = Local(model, tokenizer, Sampling(max_new_tokens=4), target="tiny", batch_size=2)
    source = write_rows(tmp_path / "in.jsonl", *ROWS[:3], {"messages": talk("word " * POSITIONS)}, *ROWS[3:])
    with pytest.raises(KeyboardInterrupt):
        regenerate(DataConfig(path=source, bad_rows="skip"), answerer, tmp_path / "out.jsonl", on_answer=stop)
    write_rows(tmp_path / "in.jsonl", *ROWS)
    seen: list[int] = []
    done = regenerate(
        DataConfig(path=source),
        answerer,
        tmp_path / "out.jsonl",
        on_answer=lambda progress: seen.append(progress.samples),
    )
    assert seen == [5, 6, 7]
    assert done.left_out == ()


def test_a_conversation_that_outgrows_the_target_ends_before(tmp_path: Path, tokenizer: Any) -> None:
    prompt = tokenizer(Chat(tokenizer).render(talk("Hi"), open_answer=True), add_special_tokens=False)["input_ids"]
    target: Any = Writer([5] * 4, positions=len(prompt) + 6)
    config = DataConfig(path=write_rows(tmp_path / "in.jsonl", {"messages": talk("Hi", "x", "And?", "x", "So?")}))
    done = regenerate(config, Local(target, tokenizer, Sampling(max_new_tokens=4), target="w"), tmp_path / "out.jsonl")
    assert done.shortened == 1
    assert len(lines(tmp_path / "out.jsonl")[0]["messages"]) == 2


def test_a_target_without_a_limit_needs_one(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="give --max-new-tokens"):
        Local(Writer(positions=0), tokenizer, Sampling(), target="endless")  # type: ignore[arg-type]


def test_a_base_model_answers_nothing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "base", ""))
    with pytest.raises(DataError, match=r"base-1 knows no turns .*train on documents"):
        Local(Writer(), tokenizer, Sampling(), target="base-1")  # type: ignore[arg-type]


def test_a_conversation_the_template_refuses_is_named(tmp_path: Path) -> None:
    strict = "{% if messages[0].content == 'x' %}{{ 1 / 0 }}{% endif %}" + CHATML
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "strict", strict))
    answerer = Local(Writer(), tokenizer, Sampling(), target="tiny")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"in\.jsonl line 2: the chat template refuses it: division by zero"):
        answered(tmp_path, answerer, {"messages": talk("Hi")}, {"messages": talk("x")})
