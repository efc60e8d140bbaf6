"""What a chat template puts around an answer is learnt from it, whatever tokens the family has."""

from __future__ import annotations

from typing import Any

import pytest

from chats import CHATML, THINKING, write_tokenizer
from specd.data.frame import Frame, any_of, learn, shared
from specd.data.template import Template
from specd.data.tokenizer import load_tokenizer
from specd.errors import DataError

EACH = "{% for m in messages %}"
GEMMA = (
    EACH + "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
HARMONY = (
    EACH + "{% if m.role == 'assistant' %}"
    "{% if m.tool_calls %}{{ '<start>assistant to=' + m.tool_calls[0].function.name + '<message>' }}"
    "{{ (m.tool_calls[0].function.arguments | tojson) + '<call>' }}"
    "{% else %}{{ '<start>assistant<channel>final<message>' + m.content }}"
    "{{ '<return>' if loop.last and not add_generation_prompt else '<end>' }}{% endif %}"
    "{% else %}{{ '<start>' + m.role + '<message>' + m.content + '<end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant' }}{% endif %}"
)
GLM = (
    EACH + "{{ '<|' + m.role + '|>\n' + m.content }}{% if m.tool_calls %}"
    "{{ '<call>' + m.tool_calls[0].function.name + '</call>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LLAMA2 = (
    EACH + "{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)
COMMAND = (
    EACH + "{{ '<turn>' + m.role + '<sep>' }}{% if m.role == 'assistant' %}{{ '<say>' + m.content + '</say>' }}"
    "{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant<sep>' }}{% endif %}"
)
PHI = (
    EACH + "{{ '<|' + m.role + '|>\n' + m.content + '<end>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else '</s>' }}"
)
UNPROMPTED = EACH + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
RESULTS = (
    EACH + "{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[RESULT]' + m.content + '[/RESULT]' }}"
    "{% elif m.tool_calls %}{{ '[CALLS]' + m.tool_calls[0].function.name + '</s>' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def frame(tokenizer: Any, template: str, *tokens: str, ends: tuple[str, ...] = ()) -> Frame:
    tokenizer.chat_template = template
    return learn(Template(tokenizer, {}, ""), dict.fromkeys(tokens, True), ends)


def ends(found: Frame) -> set[str]:
    return {part.replace("\\", "") for part in found.end.pattern.replace("\\|", "¦").split("|")} - {"(?!)"}


def test_an_end_token_that_no_name_declares(tokenizer: Any) -> None:
    found = frame(tokenizer, GEMMA, "<turn>", "<end>", "\n", ends=("</s>",))
    assert (found.generation, found.header, found.leads) == ("<turn>model\n",) * 2 + (("<turn>model\n",),)
    assert (found.closing, ends(found), found.rest) == ("<end>", {"<end>", "</s>"}, "")
    assert found.tokens == {"<turn>", "<end>"}


def test_ends_that_differ_by_place_and_a_prompt_that_stops_within_the_header(tokenizer: Any) -> None:
    found = frame(tokenizer, HARMONY, "<start>", "<end>", "<return>", "<channel>", "<message>", "<call>")
    assert ends(found) == {"<return>", "<end>", "<call>"}
    assert (found.generation, found.rest) == ("<start>assistant", "<channel>final<message>")


def test_the_next_roles_token_ends_an_answer_where_nothing_else_does(tokenizer: Any) -> None:
    roles = ("<|user|>", "<|assistant|>", "<|tool|>", "<call>", "</call>")
    found = frame(tokenizer, GLM, *roles, ends=("</s>",))
    assert ends(found) == {"<¦user¦>", "<¦tool¦>", "</s>"}
    assert (found.generation, found.closing) == ("<|assistant|>", "")


def test_a_generation_prompt_that_is_the_end_of_the_question(tokenizer: Any) -> None:
    found = frame(tokenizer, LLAMA2, "<s>", "</s>", ends=("</s>",))
    assert (found.generation, found.header, found.rest, found.closing) == ("", "[/INST]", "", " </s>")


def test_tokens_that_close_the_content_and_then_the_turn(tokenizer: Any) -> None:
    assert ends(frame(tokenizer, COMMAND, "<turn>", "<sep>", "<say>", "</say>", "<end>")) == {"<end>"}


def test_a_token_behind_the_whole_conversation_ends_no_answer(tokenizer: Any) -> None:
    found = frame(tokenizer, PHI, "<|user|>", "<|assistant|>", "<end>", "</s>")
    assert (found.generation, ends(found), found.closing) == ("<|assistant|>\n", {"<end>"}, "<end>")


def test_a_template_without_any_generation_prompt(tokenizer: Any) -> None:
    found = frame(tokenizer, UNPROMPTED)
    assert (found.generation, found.header, found.rest) == ("", "assistant:", "assistant:")
    assert found.end.search("anything") is None


def test_an_end_that_is_a_text_and_no_token(tokenizer: Any) -> None:
    found = frame(tokenizer, EACH + "{{ m.role + ': ' + m.content + ' [end]\n' }}{% endfor %}", "<s>", ends=("</s>",))
    assert (ends(found), found.closing) == ({"[end]", "</s>"}, " [end]")


def test_thoughts_of_the_last_answer_alone(tokenizer: Any) -> None:
    found = frame(tokenizer, THINKING, "<|im_start|>", "<|im_end|>")
    assert found.header == "<|im_start|>assistant\n"
    assert found.leads == ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>assistant\n")


def test_an_answer_behind_results_begins_there_but_another_result_is_none(tokenizer: Any) -> None:
    found = frame(tokenizer, RESULTS, "[INST]", "[/INST]", "[RESULT]", "[/RESULT]", "[CALLS]", "</s>")
    text = "[INST]Q[/INST][CALLS]a</s>[RESULT]1[/RESULT][RESULT]2[/RESULT]Two.</s>"
    begins = [text[: header.end()] for header in found.begins.finditer(text)]
    assert begins == ["[INST]Q[/INST]", "[INST]Q[/INST][CALLS]a</s>[RESULT]1[/RESULT][RESULT]2[/RESULT]"]


def test_an_added_token_is_shared_whole_or_not_at_all() -> None:
    assert shared("<a><think>", ["<a><tool>"], ["<think>", "<a>"]) == 3
    assert shared("<a><think>", ["<a><think>x"], ["<think>"]) == 10
    assert shared("<a><a>", ["<a><"], ["<a>"]) == 3
    assert shared("", ["x"], ["<a>"]) == 0


def test_any_of_takes_the_longest() -> None:
    found = any_of(["<e>", "<e><f>"]).search("x<e><f>")
    assert found is not None
    assert found[0] == "<e><f>"
    assert any_of([]).search("x") is None


def test_templates_that_cannot_be_used(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="cannot be used: it does not write a question and an assistant's answer"):
        frame(tokenizer, EACH + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}")
    with pytest.raises(DataError, match=r"cannot be used: .* no assistant"):
        frame(tokenizer, CHATML + "{% if messages | length > 1 %}{{ raise_exception('no assistant') }}{% endif %}")
