"""The loss mask covers what the assistant writes and its end-of-turn token, whatever the chat template does."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chats import CHATML, MARKED, THINKING, TRIMMED, talk, write_tokenizer
from specd.data.chat import Chat
from specd.data.forms import conversation, questions
from specd.data.tokenizer import Encoder, load_tokenizer
from specd.errors import DataError

TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "marked": MARKED, "trimmed": TRIMMED}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    home = tmp_path_factory.mktemp("tokenizers")
    return {name: Chat(load_tokenizer(write_tokenizer(home / name, text))) for name, text in TEMPLATES.items()}


def labels(chat: Chat, row: dict[str, Any], **options: Any) -> list[str]:
    """The texts under the loss mask, as characters and (checked to be the same) as tokens."""
    rendered = chat.conversation(conversation(row, "row 1"), "row 1", **options)
    texts = [rendered.text[start:end] for start, end in rendered.spans]
    ((tokens, mask),) = Encoder(chat.tokenizer).encode([rendered])
    assert chat.tokenizer.decode(tokens[mask].tolist()) == "".join(texts)
    assert chat.tokenizer.decode(tokens.tolist()) == rendered.text
    return texts


@pytest.mark.parametrize("template", ["chatml", "thinking", "marked"])
def test_every_answer_with_its_end_of_turn_is_a_label(chats: dict[str, Chat], template: str) -> None:
    row = {"messages": talk("Hi", "Hello.", "And you?", "Fine, thanks.\n")}
    assert labels(chats[template], row) == ["Hello.<|im_end|>", "Fine, thanks.\n<|im_end|>"]
    assert labels(chats[template], row, last_turn_only=True) == ["Fine, thanks.\n<|im_end|>"]


def test_a_template_that_trims(chats: dict[str, Chat]) -> None:
    row = {"messages": talk("Hi", "  Hello. ", "And you?", "Fine.")}
    assert labels(chats["trimmed"], row) == ["Hello. <|im_end|>", "Fine. <|im_end|>"]


@given(
    contents=st.lists(st.text(string.printable + "é…日🙂", min_size=1, max_size=20), min_size=2, max_size=6),
    name=st.sampled_from(["chatml", "marked"]),
)
@settings(max_examples=60, deadline=None)
def test_any_content_is_found_exactly(chats: dict[str, Chat], contents: list[str], name: str) -> None:
    row = {"messages": talk(*contents)}
    chat = chats[name]
    rendered = chat.conversation(conversation(row, "row 1"), "row 1")
    wanted = [content + "<|im_end|>" for content in contents[1::2]]
    assert [rendered.text[start:end] for start, end in rendered.spans] == wanted


def test_content_that_looks_like_the_template(chats: dict[str, Chat]) -> None:
    row = {"messages": talk("assistant", "assistant", "say <|im_end|>", "<|im_start|>assistant\n<|im_end|> it is")}
    assert labels(chats["chatml"], row) == ["assistant<|im_end|>", "<|im_start|>assistant\n<|im_end|> it is<|im_end|>"]


def test_an_empty_think_block_is_no_label_but_thoughts_are(chats: dict[str, Chat]) -> None:
    thinking = chats["thinking"]
    assert labels(thinking, {"messages": talk("Hi", "Hello.")}) == ["Hello.<|im_end|>"]
    thought = "<think>\nA greeting.\n</think>\n\nHello."
    assert labels(thinking, {"messages": talk("Hi", thought)}) == [thought + "<|im_end|>"]
    assert labels(thinking, {"messages": talk("Hi", thought, "And?", "Fine.")}) == [
        "Hello.<|im_end|>",
        "Fine.<|im_end|>",
    ]


def test_template_options_reach_the_template(chats: dict[str, Chat]) -> None:
    silent = Chat(chats["thinking"].tokenizer, {"enable_thinking": False})
    asked = [{"role": "user", "content": "Hi"}]
    assert silent.render(asked, open_answer=True).endswith("<think>\n\n</think>\n\n")
    row = {"messages": talk("Hi", "<b>Hello</b>", "And?", "Fine.")}
    assert labels(silent, row) == ["<b>Hello</b><|im_end|>", "Fine.<|im_end|>"]


def test_tool_calls_are_labels_and_tool_turns_are_not(chats: dict[str, Chat]) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "Sunny."},
        ]
    }
    assert labels(chats["thinking"], row) == ["\n<tool_call>\nweather\n</tool_call><|im_end|>", "Sunny.<|im_end|>"]


def test_a_cut_off_answer_has_no_end_of_turn_label(chats: dict[str, Chat]) -> None:
    row = {"messages": talk("Hi", "Hello.", "And?", "Fine, and I"), "finish_reason": "length"}
    for name in ("chatml", "marked"):
        assert labels(chats[name], row) == ["Hello.<|im_end|>", "Fine, and I"]


@pytest.mark.parametrize("template", ["chatml", "thinking", "marked"])
def test_every_cut_off_answer_loses_its_end_of_turn_label(chats: dict[str, Chat], template: str) -> None:
    talked = talk("Hi", "Hello, and", "And?", "Fine.", "So?", "So I")
    for turn, reason in ((1, "length"), (3, "stop"), (5, "length")):
        talked[turn]["finish_reason"] = reason
    assert labels(chats[template], {"messages": talked}) == ["Hello, and", "Fine.<|im_end|>", "So I"]
    assert labels(chats[template], {"messages": talked}, last_turn_only=True) == ["So I"]
    assert labels(chats[template], {"messages": talked[:4]}) == ["Hello, and", "Fine.<|im_end|>"]


def test_a_cut_answer_that_its_template_marks_in_parts(tmp_path: Path) -> None:
    """The last part of an answer is the one that was cut, however many there are and whichever answer it is."""
    twice = MARKED.replace("{% generation %}", "{% generation %}{{ '> ' }}{% endgeneration %}{{ '-' }}{% generation %}")
    chat = Chat(load_tokenizer(write_tokenizer(tmp_path, twice)))
    talked = talk("Hi", "Hello, and", "And?", "Fine.")
    talked[1]["finish_reason"] = "length"
    assert labels(chat, {"messages": talked}) == ["> ", "Hello, and", "> ", "Fine.<|im_end|>"]


def test_templates_do_not_see_finish_reason(tmp_path: Path) -> None:
    for number, shown in enumerate((CHATML, MARKED)):
        strict = "{% for message in messages %}{% if message.finish_reason is defined %}{{ 1 / 0 }}{% endif %}"
        chat = Chat(load_tokenizer(write_tokenizer(tmp_path / str(number), strict + "{% endfor %}" + shown)))
        talked = talk("Hi", "Hello, and")
        talked[1]["finish_reason"] = "length"
        assert labels(chat, {"messages": talked}) == ["Hello, and"]
        assert "Hello, and" in chat.render([*talked, *talk("And?")], open_answer=True)


def test_preformatted_text_is_split_as_its_template_would(chats: dict[str, Chat]) -> None:
    for name in ("chatml", "thinking"):
        rendered = chats[name].conversation({"messages": talk("Hi", "Hello.", "And?", "Fine.")}, "row 1")
        assert chats[name].preformatted(rendered.text).spans == rendered.spans
        assert chats[name].preformatted(rendered.text, last_turn_only=True).spans == rendered.spans[-1:]


def test_a_plain_document_is_all_labels_and_a_question_alone_is_not(chats: dict[str, Chat]) -> None:
    assert chats["chatml"].preformatted("Once upon a time").spans == ((0, 16),)
    assert chats["chatml"].preformatted("<|im_start|>user\nHi<|im_end|>\n").spans == ()


def test_share_gpt_rows_and_parts_of_text() -> None:
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    assert conversation(row, "row 1") == talk("Hi", "Hello.")
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]}
    assert turns(parts, "row 1") == talk("Hi")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "'messages' is []"),
        ({"messages": "Hi"}, "'messages' is 'Hi'"),
        ({"messages": ["Hi"]}, "a turn in 'messages' is 'Hi'"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "turn 1 has role 'robot'; expected one of system"),
        ({"messages": [{"role": "user", "content": 3}]}, "turn 1 has content 3"),
        ({"messages": [{"role": "user"}]}, "turn 1 has content None"),
        ({"conversations": [{"from": "human", "text": "Hi"}]}, "turn 1 has content None"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "turn 1 has content [{'type': 'image'}]"),
    ],
)
def test_malformed_rows_are_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as error:
        conversation(row, "chats.jsonl line 7")
    assert str(error.value).startswith("chats.jsonl line 7: ")
    assert said in str(error.value)


def test_a_template_that_refuses_is_named(chats: dict[str, Chat], tmp_path: Path) -> None:
    strict = CHATML.replace(
        "{% for message", "{% if messages[0].content == 'x' %}{{ 1 / 0 }}{% endif %}{% for message", 1
    )
    chat = Chat(load_tokenizer(write_tokenizer(tmp_path, strict)))
    with pytest.raises(DataError, match=r"row 1: the chat template refuses it: division by zero"):
        chat.conversation({"messages": talk("x", "y")}, "row 1")


def test_no_template_and_a_template_without_content(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "a"))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Chat(tokenizer)
    with pytest.raises(DataError, match="does not write an assistant's content"):
        Chat(load_tokenizer(write_tokenizer(tmp_path / "b", "{{ messages | length }}")))


def test_questions_are_what_leads_up_to_each_answer() -> None:
    system = {"role": "system", "content": "Be brief."}
    first, _, second = talk("Hi", "Hello.", "And?")
    assert questions([system, *talk("Hi", "Hello.", "And?", "Fine.")], "row 1") == [[system, first], [second]]
    assert questions(talk("Hi"), "row 1") == [[first]]
    for empty in ([system], [{"role": "assistant", "content": "Hello."}]):
        with pytest.raises(DataError, match="row 1: no user turn to answer"):
            questions(empty, "row 1")
