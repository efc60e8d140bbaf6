"""What the rows of a data set ask in an evaluation: with a chat template, without one, and when they cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chats import talk, write_rows, write_tokenizer
from specd.config.settings import DataConfig
from specd.data.tokenizer import load_tokenizer
from specd.errors import DataError
from specd.evaluate import prompts
from specd.evaluate.prompts import read_prompts

SIZE = 400
ASKED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As of a base model: no chat template, and a document stands between two tokens of the tokenizer's own."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    directory = write_tokenizer(tmp_path_factory.mktemp("base"))
    (directory / "chat_template.jinja").unlink()
    core = Tokenizer.from_file(str(directory / "tokenizer.json"))
    core.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)]
    )
    core.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


def asked(tokenizer: Any, tmp_path: Path, *rows: dict[str, Any], limit: int = 0, **settings: Any) -> list[str]:
    config = DataConfig(path=write_rows(tmp_path / "asked.jsonl", *rows), **settings)
    found = read_prompts(config, tokenizer, size=SIZE, limit=limit)
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in found.ids]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": talk("Hi", "Hello.", "And you?", "Fine.")},
        {"messages": talk("Hi")},
        {"prompt": "Hi"},
        {"prompt": "Hi", "completion": "Hello."},
        {"question": "Hi", "answer": "Hello."},
        {"text": ASKED + "Hello.<|im_end|>\n"},
    ],
)
def test_a_target_with_a_chat_template_is_asked_by_it(chat: Any, tmp_path: Path, row: dict[str, Any]) -> None:
    assert asked(chat, tmp_path, row) == [ASKED]


def test_names_of_columns_are_those_of_the_file(chat: Any, tmp_path: Path) -> None:
    assert asked(chat, tmp_path, {"body": "Hi"}, columns={"prompt": "body"}) == [ASKED]


def test_a_target_without_one_goes_on_with_what_stands_there(
    base: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the token that begins a document, and without the one that ends it."""
    rows = [{"prompt": "Hi"}, {"text": "Hi"}, {"prompt": "Hi", "completion": "Hello."}, {"instruction": "Hi"}]
    assert asked(base, tmp_path, *rows) == ["<|endoftext|>Hi"] * 4
    assert not caplog.records
    assert asked(base, tmp_path, {"messages": talk("Hi", "Hello.")}) == ["<|endoftext|>Hi"]
    assert "has no chat template: 1 questions are asked as they stand" in caplog.text


def test_a_document_is_asked_by_its_beginning(
    base: Any, chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "DOCUMENT_TOKENS", 3)
    assert asked(base, tmp_path, {"text": "abcdef"}) == ["<|endoftext|>ab"]
    assert asked(base, tmp_path, {"prompt": "zqzqzq"}) == ["<|endoftext|>zqzqzq"], "a prompt is taken whole"
    assert asked(chat, tmp_path, {"text": "zqzqzq"}) == ["zqz"]


def test_token_ids_are_asked_up_to_the_first_label(chat: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "DOCUMENT_TOKENS", 2)
    rows = [
        {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 0, 1]},
        {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 0, 0]},
        {"input_ids": [5, 6, 7, 8]},
    ]
    config = DataConfig(path=write_rows(tmp_path / "ids.jsonl", *rows))
    assert read_prompts(config, chat, size=SIZE).ids == ((5, 6, 7), (5, 6, 7, 8), (5, 6))


BAD: list[dict[str, Any]] = [
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "assistant", "content": "x"}]},
    {"input_ids": [1, SIZE], "loss_mask": [0, 0]},
    {"text": " "},
    {"prompt": "Hi " * 90},
]


def test_rows_that_cannot_be_used_are_counted_by_kind(
    chat: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "asked.jsonl"
    write_rows(file, {"prompt": "Hi"}, *BAD, {"prompt": "Hi"})
    file.write_text("broken\n" + file.read_text())
    config = DataConfig(path=str(file))
    with pytest.raises(DataError, match=r"6 of 8 rows cannot be used(.|\n)*asked\.jsonl line 3.*'robot'"):
        read_prompts(config, chat, size=SIZE, longest=60)
    found = read_prompts(DataConfig(path=str(file), bad_rows="skip"), chat, size=SIZE, longest=60)
    assert (len(found.ids), sum(fault.rows for fault in found.bad)) == (2, 6)
    text = " ".join(fault.first for fault in found.bad)
    for said in ("line 1: ", "'robot'", "no user turn", f"has token {SIZE}; expected", "is empty", "at most 60"):
        assert said in text
        assert said in caplog.text


def test_only_as_many_rows_are_read_as_are_asked(chat: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "Hi"}, BAD[0], {"prompt": "Hi"}, {"prompt": "Hi"}, BAD[1]]
    assert len(asked(chat, tmp_path, *rows, limit=1)) == 1
    assert len(asked(chat, tmp_path, *rows, limit=3, bad_rows="skip")) == 3
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
        asked(chat, tmp_path, *rows, limit=2)


def test_several_files_are_asked_one_after_the_other(chat: Any, tmp_path: Path) -> None:
    paths = tuple(write_rows(tmp_path / f"{name}.jsonl", {"prompt": f"Hi {name}"}) for name in "ab")
    found = read_prompts(DataConfig(path=paths), chat, size=SIZE)
    assert [f"Hi {name}" in chat.decode(ids) for ids, name in zip(found.ids, "ab", strict=True)] == [True, True]


def test_conversations_need_a_template_and_someone_who_asks(base: Any, tmp_path: Path) -> None:
    row = {"messages": [{"role": "system", "content": "Be kind."}, *talk("Hi", "Hello.")]}
    with pytest.raises(DataError, match="the target has no chat template; expected `prompt` or `text`"):
        asked(base, tmp_path, row)
    with pytest.raises(DataError, match=r"none of the 1 rows of .* asks anything"):
        asked(base, tmp_path, row, bad_rows="skip")
