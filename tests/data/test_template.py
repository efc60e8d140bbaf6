"""A chat template gets its variables, its tools and a day that does not change."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from chats import CHATML, MARKED, talk, write_tokenizer
from specd.data.chat import Chat
from specd.data.faults import RowError
from specd.data.forms import Conversation
from specd.data.template import Template
from specd.data.tokenizer import load_tokenizer
from specd.errors import ConfigError, DataError

DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML
LLAMA = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def shown(tokenizer: Any, template: Any, **options: Any) -> Any:
    tokenizer.chat_template = template
    return Chat(tokenizer, **options)


def test_the_text_is_that_of_transformers(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML + "{{ name | default('') }}{{ eos_token }}{{ tools | default('', true) }}"
    row = Template(tokenizer, {"name": "Ann"}, "").row("row 1", [{"type": "function"}], {"name": "Bea"})
    wanted: Any = tokenizer.apply_chat_template
    for opened in (False, True):
        assert row.render(talk("Hi", "Ho"), open_answer=opened) == wanted(
            talk("Hi", "Ho"), tokenize=False, add_generation_prompt=opened, name="Bea", tools=[{"type": "function"}]
        )
    assert Template(tokenizer, {"name": "Ann"}, "").row("row 1").render(talk("Hi")).endswith("Ann<|im_end|>")


def test_spans_that_a_template_marks(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED
    row = Template(tokenizer, {}, "").row("row 1")
    text, spans = row.marked(talk("Hi", "Ho", "", ""))
    assert row.marks_answers
    assert [text[start:end] for start, end in spans] == ["Ho<|im_end|>", "<|im_end|>"]
    tokenizer.chat_template = CHATML
    assert not Template(tokenizer, {}, "").row("row 1").marks_answers


def test_the_second_template_is_for_rows_with_tools(tokenizer: Any) -> None:
    second = CHATML.replace("Be brief.", "Use tools.")
    chat = shown(tokenizer, {"default": CHATML, "tool_use": second})
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert "Be brief." in chat.render(talk("Hi"))
    assert "Use tools." in chat.render(talk("Hi"), tools=tools)
    assert "Use tools." in chat.conversation(Conversation(turns=talk("Hi", "Ho"), tools=tools), "row 1").text
    with pytest.raises(DataError, match="has the chat templates rag, tool_use, and none named default"):
        shown(tokenizer, {"rag": CHATML, "tool_use": CHATML})


def test_a_template_that_reads_parts_alone_gets_them(tokenizer: Any) -> None:
    parts = CHATML.replace("message['content'] +", "message['content'] | map(attribute='text') | join +")
    chat = shown(tokenizer, parts)
    rendered = chat.conversation(Conversation(turns=talk("Hi", "Ho")), "row 1")
    assert rendered.text.endswith("user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n")
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["Ho<|im_end|>"]
    assert "user\nHi\ufdd0!<|im_end|>" in chat.render(talk("Hi\ufdd0!"))  # what stands for an image elsewhere


@pytest.mark.parametrize("shown_as", ["'' + call.function.arguments", "call.function.arguments"])
def test_a_template_that_reads_arguments_as_json_gets_them_so(tokenizer: Any, shown_as: str) -> None:
    """One joins them to a text, which refuses an object; another would write what Python calls it."""
    calls = "{% for call in message.tool_calls or [] %}{{ " + shown_as + " }}{% endfor %}"
    chat = shown(tokenizer, CHATML.replace("+ '<|im_end|>", "}}" + calls + "{{ '<|im_end|>"))
    call = {"function": {"name": "look", "arguments": {"at": "é", "n": [1]}}}
    turns = [*talk("Hi"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    rendered = chat.conversation(Conversation(turns=turns), "row 1")
    assert [rendered.text[start:end] for start, end in rendered.spans] == ['{"at": "é", "n": [1]}<|im_end|>']
    assert '{"at": "é", "n": [1]}' in chat.render([*turns, *talk("And?")], open_answer=True)
    assert call["function"] == {"name": "look", "arguments": {"at": "é", "n": [1]}}


def test_what_a_template_refuses_names_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(RowError, match="row 7: the chat template refuses it: no system turn") as error:
        Template(tokenizer, {}, "").row("row 7").render(talk("Hi"))
    assert error.value.kind == "refused by the chat template"
    with pytest.raises(RowError, match="row 8: the chat template refuses it"):
        Template(tokenizer, {}, "").row("row 8", options={"add_generation_prompt": True}).render(talk("Hi"))


def test_a_template_that_asks_for_the_clock_is_told_the_day_of_the_run(tokenizer: Any) -> None:
    chat = shown(tokenizer, DATED, date="2026-01-31")
    assert chat.asks_clock
    assert chat.render(talk("Hi")).startswith("31 Jan 2026<|im_start|>")
    assert chat.conversation(Conversation(turns=talk("Hi", "Ho")), "row 1").text.startswith("31 Jan 2026")
    today = shown(tokenizer, DATED).render(talk("Hi"))
    assert datetime.strptime(today[:11], "%d %b %Y").date() in (datetime.now().date(), chat_day(today))
    assert not shown(tokenizer, CHATML).asks_clock


def chat_day(text: str) -> Any:
    """The day in `text`, if it is at most one before today: midnight may fall into the test."""
    day = datetime.strptime(text[:11], "%d %b %Y").date()
    return day if (datetime.now().date() - day).days <= 1 else None


def test_a_date_that_is_given_or_asked_for_elsewhere(tokenizer: Any) -> None:
    assert shown(tokenizer, LLAMA + CHATML).asks_clock
    assert not shown(tokenizer, LLAMA + CHATML, options={"date_string": "26 Jul 2024"}).asks_clock
    hidden = "{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + CHATML
    assert shown(tokenizer, hidden).asks_clock
    with pytest.raises(ConfigError, match=r"data.date=2026-02-31: expected a day that there is"):
        shown(tokenizer, CHATML, date="2026-02-31")


def test_files_of_a_second_template_are_read(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML.replace("Be brief.", "Use tools.")}
    tokenizer.save_pretrained(tmp_path)
    assert "Use tools." in Chat(load_tokenizer(tmp_path)).render(talk("Hi"), tools=[{"type": "function"}])
