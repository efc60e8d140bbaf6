"""The loss mask covers what the assistant writes and its end-of-turn token, whatever the chat template does."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chats import CHATML, MARKED, THINKING, TRIMMED, talk, write_tokenizer
from specd.data.chat import Chat, Rendered, document
from specd.data.forms import Conversation, conversation
from specd.data.tokenizer import Encoder, load_tokenizer
from specd.errors import DataError

TEMPLATES = {"chatml": CHATML, "thinking": THINKING, "marked": MARKED, "trimmed": TRIMMED}
R1 = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '<|im_start|>' + message.content }}{% else %}"
    "{{ '<|im_start|>assistant ' + message.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant <think>\n' }}{% endif %}"
)
"""As DeepSeek R1's distillations: what stands before </think> is left out of every answer."""


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    home = tmp_path_factory.mktemp("tokenizers")
    return {name: Chat(load_tokenizer(write_tokenizer(home / name, text))) for name, text in TEMPLATES.items()}


def rendered_of(chat: Chat, row: dict[str, Any], **options: Any) -> Rendered:
    return chat.conversation(conversation(row, "row 1"), "row 1", **options)


def texts(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


def labels(chat: Chat, row: dict[str, Any], **options: Any) -> list[str]:
    """The texts under the loss mask, as characters and (checked to be the same) as tokens."""
    rendered = rendered_of(chat, row, **options)
    ((tokens, mask),) = Encoder(chat.tokenizer).encode([rendered])
    assert chat.tokenizer.decode(tokens[mask].tolist()) == "".join(texts(rendered))
    assert chat.tokenizer.decode(tokens.tolist()) == rendered.text
    return texts(rendered)


@pytest.mark.parametrize("template", ["chatml", "thinking", "marked"])
def test_every_answer_with_its_end_of_turn_is_a_label(chats: dict[str, Chat], template: str) -> None:
    row = {"messages": talk("Hi", "Hello.", "And you?", "<think>\nWell.\n</think>\n\nFine, thanks.\n")}
    said = ["Hello.<|im_end|>", "<think>\nWell.\n</think>\n\nFine, thanks.\n<|im_end|>"]
    assert labels(chats[template], row) == said
    assert labels(chats[template], row, last_turn_only=True) == said[1:]


def test_a_template_that_trims_and_writes_a_space_before_each_answer(chats: dict[str, Chat]) -> None:
    row = {"messages": talk("Hi", "  Hello. ", "And you?", "Fine.")}
    assert labels(chats["trimmed"], row) == [" Hello. <|im_end|>", " Fine. <|im_end|>"]


@given(
    contents=st.lists(st.text(string.printable + "é…日🙂\U000f0001\U00100000", max_size=20), min_size=2, max_size=6),
    name=st.sampled_from(["chatml", "marked"]),
)
@settings(max_examples=60, deadline=None)
def test_any_content_is_found_exactly(chats: dict[str, Chat], contents: list[str], name: str) -> None:
    rendered = rendered_of(chats[name], {"messages": talk(*contents)})
    assert texts(rendered) == [content + "<|im_end|>" for content in contents[1::2]]
    assert rendered.dropped == 0


def test_content_that_looks_like_the_template(chats: dict[str, Chat]) -> None:
    row = {"messages": talk("assistant", "assistant", "say <|im_end|>", "<|im_start|>assistant\n<|im_end|> it is")}
    assert labels(chats["chatml"], row) == ["assistant<|im_end|>", "<|im_start|>assistant\n<|im_end|> it is<|im_end|>"]


def test_thoughts_are_labels_where_they_stand_and_counted_where_they_do_not(chats: dict[str, Chat]) -> None:
    thinking = chats["thinking"]
    thought = "<think>\nA greeting.\n</think>\n\nHello."
    assert labels(thinking, {"messages": talk("Hi", thought)}) == [thought + "<|im_end|>"]
    row = {"messages": talk("Hi", thought, "And?", thought)}
    assert labels(thinking, row) == ["Hello.<|im_end|>", thought + "<|im_end|>"]
    assert rendered_of(thinking, row).dropped == 1
    assert rendered_of(thinking, row, last_turn_only=True).dropped == 0


def test_an_empty_think_block_is_a_label_unless_the_prompt_has_it(chats: dict[str, Chat]) -> None:
    row = {"messages": talk("Hi", "Hello.", "And?", "Fine.")}
    assert labels(chats["thinking"], row) == ["Hello.<|im_end|>", "<think>\n\n</think>\n\nFine.<|im_end|>"]
    silent = Chat(chats["thinking"].tokenizer, {"enable_thinking": False})
    assert labels(silent, row) == ["Hello.<|im_end|>", "Fine.<|im_end|>"]
    assert labels(silent, {"messages": talk("Hi", "<b>Hello</b>")}) == ["<b>Hello</b><|im_end|>"]


def test_a_rows_own_template_variables_go_before_those_of_the_settings(chats: dict[str, Chat]) -> None:
    row = {"messages": talk("Hi", "Hello."), "chat_template_kwargs": {"enable_thinking": False}}
    assert labels(chats["thinking"], row) == ["Hello.<|im_end|>"]


def test_a_last_answer_that_its_template_cuts_stands_as_it_was_written(tmp_path: Path) -> None:
    chat = Chat(load_tokenizer(write_tokenizer(tmp_path, R1)))
    for thought in ("Adding.\n</think>\n\nFour.", "<think>\nAdding.\n</think>\n\nFour."):
        rendered = rendered_of(chat, {"messages": talk("2 + 2?", thought, "3 + 3?", thought)})
        assert texts(rendered) == ["\n\nFour.<|im_end|>", "Adding.\n</think>\n\nFour.<|im_end|>"]
        assert rendered.text.endswith("<|im_start|>assistant <think>\nAdding.\n</think>\n\nFour.<|im_end|>")
        assert rendered.dropped == 1
    cut = talk("2 + 2?", "Adding.\n</think>\n\nFour.")
    cut[1]["finish_reason"] = "length"
    assert labels(chat, {"messages": cut}) == ["Adding.\n</think>\n\nFour."]
    beside = talk("2 + 2?", "Four.")
    beside[1]["reasoning_content"] = "Adding."
    rendered = rendered_of(chat, {"messages": beside})
    assert (texts(rendered), rendered.dropped) == (["Four.<|im_end|>"], 1)


def test_a_last_answer_that_was_cut_within_its_thoughts_stands_as_it_was_written(
    chats: dict[str, Chat], tmp_path: Path
) -> None:
    """A template takes it for an answer without thoughts."""
    r1 = Chat(load_tokenizer(write_tokenizer(tmp_path, R1)))
    written = [(r1, "Adding, and", "Adding, and"), (r1, "<think>\nAdding, and", "Adding, and")]
    for chat, content, begun in [*written, (chats["thinking"], "<think>\nAdding, and", "<think>\nAdding, and")]:
        asked = talk("Hi", "Ho.", "2 + 2?")
        answered = {"role": "assistant", "content": content}
        rendered = rendered_of(chat, {"messages": [*asked, answered], "finish_reason": "length"})
        assert rendered.text == chat.render(asked, open_answer=True) + begun
        assert texts(rendered) == ["Ho.<|im_end|>", begun]


def test_tool_calls_are_labels_and_tool_turns_are_not(chats: dict[str, Chat]) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Use tools."},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather"}}]},
            {"role": "tool", "content": "sunny"},
            {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nSunny."},
        ]
    }
    said = ["\n<tool_call>\nweather\n</tool_call><|im_end|>", "<think>\nWell.\n</think>\n\nSunny.<|im_end|>"]
    assert labels(chats["thinking"], row) == said


@pytest.mark.parametrize("template", ["chatml", "thinking", "marked"])
def test_every_cut_off_answer_loses_its_end_of_turn_label(chats: dict[str, Chat], template: str) -> None:
    talked = talk("Hi", "Hello, and", "And?", "Fine.", "So?", "<think>\nSo\n</think>\n\nI")
    for turn, reason in ((1, "length"), (3, "stop"), (5, "length")):
        talked[turn]["finish_reason"] = reason
    last = "<think>\nSo\n</think>\n\nI"
    assert labels(chats[template], {"messages": talked}) == ["Hello, and", "Fine.<|im_end|>", last]
    assert labels(chats[template], {"messages": talked}, last_turn_only=True) == [last]
    row = {"messages": talk("Hi", "Hello."), "finish_reason": "length"}
    assert labels(chats["chatml"], row) == ["Hello."]


@pytest.mark.parametrize("template", ["chatml", "marked"])
def test_an_answer_that_is_context_is_no_label(chats: dict[str, Chat], template: str) -> None:
    turns = talk("Hi", "Hello.", "And?", "Fine.", "So?", "So.")
    rendered = chats[template].conversation(Conversation(turns=turns, context=frozenset({1, 5})), "row 1")
    assert texts(rendered) == ["Fine.<|im_end|>"]
    assert "Hello.<|im_end|>" in rendered.text


def test_a_cut_answer_that_its_template_marks_in_parts(tmp_path: Path) -> None:
    """The last part of an answer is the one that was cut, however many there are and whichever answer it is."""
    twice = MARKED.replace("{% generation %}", "{% generation %}{{ '> ' }}{% endgeneration %}{{ '-' }}{% generation %}")
    chat = Chat(load_tokenizer(write_tokenizer(tmp_path, twice)))
    talked = talk("Hi", "Hello, and", "And?", "Fine.")
    talked[1]["finish_reason"] = "length"
    assert labels(chat, {"messages": talked}) == ["> ", "Hello, and", "> ", "Fine.<|im_end|>"]
    assert labels(chat, {"messages": talked}, last_turn_only=True) == ["> ", "Fine.<|im_end|>"]


def test_a_marked_span_of_token_0_or_of_white_space_ends_where_it_ends(tmp_path: Path) -> None:
    shown = MARKED.replace("message['content'] + '<|im_end|>'", "message['content']")
    chat = Chat(load_tokenizer(write_tokenizer(tmp_path, shown)))
    zero = chat.tokenizer.convert_ids_to_tokens(0)
    assert labels(chat, {"messages": talk("Hi", f"Hello{zero}", "And?", "Fine. \n ", "So?")}) == [
        f"Hello{zero}",
        "Fine. \n ",
    ]


def test_templates_do_not_see_finish_reason(tmp_path: Path) -> None:
    for number, shown in enumerate((CHATML, MARKED)):
        strict = "{% for message in messages %}{% if message.finish_reason is defined %}{{ 1 / 0 }}{% endif %}"
        chat = Chat(load_tokenizer(write_tokenizer(tmp_path / str(number), strict + "{% endfor %}" + shown)))
        talked = talk("Hi", "Hello, and")
        talked[1]["finish_reason"] = "length"
        assert labels(chat, {"messages": talked}) == ["Hello, and"]


def test_preformatted_text_is_split_as_its_template_would(chats: dict[str, Chat]) -> None:
    for name in ("chatml", "thinking", "trimmed"):
        rendered = rendered_of(chats[name], {"messages": talk("Hi", "Hello.", "And?", "Fine.")})
        assert chats[name].preformatted(rendered.text).spans == rendered.spans
        assert chats[name].preformatted(rendered.text, last_turn_only=True).spans == rendered.spans[-1:]
    cut = chats["chatml"].preformatted("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello, and")
    assert texts(cut) == ["Hello, and"]


def test_a_plain_document_is_all_labels_and_a_question_alone_is_not(chats: dict[str, Chat]) -> None:
    assert chats["chatml"].preformatted("Once upon a time") == document("Once upon a time")
    assert document("Once upon a time").spans == ((0, 16),)
    assert document("Once upon a time", prompt=5).spans == ((5, 16),)
    assert document("Once", prompt=4).spans == ()
    assert chats["chatml"].preformatted("<|im_start|>user\nHi<|im_end|>\n").spans == ()


def test_a_template_that_refuses_is_named(tmp_path: Path) -> None:
    strict = CHATML.replace(
        "{% for message", "{% if messages[0].content == 'x' %}{{ 1 / 0 }}{% endif %}{% for message", 1
    )
    chat = Chat(load_tokenizer(write_tokenizer(tmp_path, strict)))
    with pytest.raises(DataError, match=r"row 1: the chat template refuses it: division by zero"):
        rendered_of(chat, {"messages": talk("x", "y")})


def test_no_template_and_a_template_without_content(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "a"))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Chat(tokenizer)
    with pytest.raises(DataError, match="cannot be used: it does not write a question and an assistant's answer"):
        Chat(load_tokenizer(write_tokenizer(tmp_path / "b", "{{ messages | length }}")))
    with pytest.raises(DataError, match=r"the chat template cannot be used: .*division by zero; use `text`"):
        Chat(load_tokenizer(write_tokenizer(tmp_path / "c", "{{ 1 / 0 }}")))


def test_ends_of_the_generation_config_and_of_the_caller(tmp_path: Path) -> None:
    """A token that only those name ends an answer where it stands, though short conversations do not show it."""
    shown = CHATML.replace("'<|im_end|>\n'", "message['end'] | default('') + '\n'")
    tokenizer: Any = load_tokenizer(write_tokenizer(tmp_path, shown))
    tokenizer.eos_token = None
    turns = talk("Hi", "Hello.", "And?")
    turns[1]["end"] = "!<|endoftext|>"
    said = Conversation(turns=turns)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert texts(Chat(tokenizer, ends=[end]).conversation(said, "row 1")) == ["Hello.!<|endoftext|>"]
    assert texts(Chat(tokenizer).conversation(said, "row 1")) != ["Hello.!<|endoftext|>"]
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{end}, 1000000]}}')
    assert texts(Chat(tokenizer).conversation(said, "row 1")) == ["Hello.!<|endoftext|>"]
