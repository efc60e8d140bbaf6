"""An answer's labels begin behind the generation prompt, or where its text stands, and end with its own end token."""

from __future__ import annotations

from typing import Any

import pytest

from chats import CHATML, THINKING, talk, write_tokenizer
from specd.data.chat import Chat, Rendered
from specd.data.faults import RowError
from specd.data.forms import Conversation, Turn
from specd.data.labels import complete, pieces, said, trailing
from specd.data.template import Renderer
from specd.data.tokenizer import load_tokenizer

EACH = "{% for m in messages %}"
HARMONY = (
    EACH + "{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
    "{% endif %}{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{{ '<|start|>assistant to=functions.' + f.name + '<|message|>' + f.arguments | tojson + '<|call|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}{{ '<|start|>functions.' + messages[loop.index0 - 1].tool_calls[0].function.name }}"
    "{{ ' to=assistant<|message|>' + m.content | tojson + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
"""As gpt-oss's."""

GLM = (
    EACH + "{{ '<|' + m.role + '|>\n' + m.content }}{% for call in m.tool_calls or [] %}"
    "{{ '\n<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""As GLM-4.5's."""

LLAMA2 = (
    EACH + "{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' </s>' }}{% endif %}{% endfor %}"
)
PROMPTED = (
    EACH + "{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1].strip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n<think>\n' }}{% endif %}"
)
"""As thinking models': the prompt opens thoughts, which no answer of the text has."""

UNPROMPTED = EACH + "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
TOKENS = [
    *("<|start|>", "<|channel|>", "<|message|>", "<|call|>", "<|end|>", "<|return|>", "<s>", "</s>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"),
]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found: Any = load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    found.add_tokens(TOKENS, special_tokens=True)
    found.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
    return found


def chat_of(tokenizer: Any, template: str, **options: Any) -> Chat:
    tokenizer.chat_template = template
    return Chat(tokenizer, options)


def rendered(tokenizer: Any, template: str, turns: list[Turn], **rest: Any) -> Rendered:
    return chat_of(tokenizer, template).conversation(Conversation(turns=turns, **rest), "row 1")


def labels(tokenizer: Any, template: str, turns: list[Turn], **rest: Any) -> list[str]:
    found = rendered(tokenizer, template, turns, **rest)
    return [found.text[start:end] for start, end in found.spans]


def called(content: str = "") -> list[Turn]:
    return [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "content": "seen \n"},
        {"role": "assistant", "content": "Seen."},
    ]


def test_each_answer_ends_at_its_own_end_token(tokenizer: Any) -> None:
    turns = talk("Hi", "Ho <|end|>.", "And?", "Fine.")
    assert labels(tokenizer, HARMONY, turns) == ["Ho <|end|>.<|end|>", "Fine.<|return|>"]
    assert labels(tokenizer, HARMONY, turns[:3]) == ["Ho <|end|>.<|end|>"]
    assert labels(tokenizer, HARMONY, called()) == [
        ' to=functions.look<|message|>{"at": "it"}<|call|>',
        "Seen.<|return|>",
    ]


def test_thoughts_and_what_stands_between_them_and_the_answer_are_labels(tokenizer: Any) -> None:
    turns = [*talk("Hi", "Ho.", "And?", "Fine.")]
    turns[1]["thinking"], turns[3]["thinking"] = "Well.", "Good."
    found = rendered(tokenizer, HARMONY, turns)
    assert [found.text[start:end] for start, end in found.spans] == [
        "Ho.<|end|>",
        "<|channel|>analysis<|message|>Good.<|end|><|start|>assistant<|channel|>final<|message|>Fine.<|return|>",
    ]
    assert found.dropped == 1
    preformatted = chat_of(tokenizer, HARMONY).preformatted(found.text)
    assert preformatted.spans == found.spans


def test_the_next_roles_token_ends_an_answer_that_has_no_other_end(tokenizer: Any) -> None:
    assert labels(tokenizer, GLM, talk("Hi", "Ho.", "And?", "Fine.\n")) == ["\nHo.<|user|>", "\nFine.\n"]
    assert labels(tokenizer, GLM, called("Wait.")) == [
        '\nWait.\n<tool_call>look{"at": "it"}</tool_call><|tool|>',
        "\nSeen.",
    ]
    assert labels(tokenizer, GLM, called()[:2]) == ['\n\n<tool_call>look{"at": "it"}</tool_call>']
    between = [*called()[:2], {"role": "system", "content": "Be brief."}]
    assert labels(tokenizer, GLM, between) == ['\n\n<tool_call>look{"at": "it"}</tool_call>']


def test_white_space_behind_the_prompt_belongs_to_the_first_token(tokenizer: Any) -> None:
    assert labels(tokenizer, LLAMA2, talk("Hi ", "Ho.\n", "And?", " Fine.")) == [" Ho. </s>", " Fine. </s>"]


def test_white_space_at_the_end_of_a_question_is_no_label(tokenizer: Any) -> None:
    for space in ("\n", " \n\n", " "):
        turns = talk(f"Hi{space}", "Ho.", "And?", "Fine.")
        assert labels(tokenizer, CHATML, turns) == ["Ho.<|im_end|>", "Fine.<|im_end|>"]
        assert labels(tokenizer, LLAMA2, turns) == [" Ho. </s>", " Fine. </s>"]


@pytest.mark.parametrize(
    ("template", "begin", "end"), [(CHATML, "", "<|im_end|>"), (LLAMA2, " ", " </s>"), (GLM, "\n", "")]
)
def test_an_assistant_that_begins_and_two_answers_in_a_row(tokenizer: Any, template: str, begin: str, end: str) -> None:
    turns = [{"role": "assistant", "content": content} for content in ("Ho.", "Fine.")]
    assert labels(tokenizer, template, turns) == [f"{begin}Ho.{end}", f"{begin}Fine.{end}"]
    two = labels(tokenizer, template, [*talk("Hi"), *turns])
    assert two == [f"{begin}Ho.{end}", f"{begin}Fine.{end}"]


def test_empty_answers_have_their_end_alone(tokenizer: Any) -> None:
    turns = talk("Hi", "", "And?", " \n", "So?", "Fine.")
    ends = ["<|im_end|>", " \n<|im_end|>", "Fine.<|im_end|>"]
    assert labels(tokenizer, CHATML, turns) == ends
    # A template that looks whether there is content writes other text where marks stand.
    looking = CHATML.replace("message['content'] +", "(message['content'] or '') +").replace(
        "{{ '<|im_start|>'", "{% if message['content'] %}{{ '' }}{% else %}{{ ' ' }}{% endif %}{{ '<|im_start|>'", 1
    )
    assert labels(tokenizer, looking, turns) == ends
    skipping = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.content %}", 1)
    found = rendered(tokenizer, skipping, turns[:2])
    assert (found.spans, found.dropped) == ((), 1)


def test_an_answer_that_does_not_begin_with_the_prompt_begins_behind_its_header(tokenizer: Any) -> None:
    """The history of a thinking model, and answers whose thoughts stand in another way than the prompt opens them."""
    turns = talk("Hi", "A\n</think>\n\nHo.", "And?", "<b>Fine</b>")
    found = rendered(tokenizer, PROMPTED, turns)
    assert [found.text[start:end] for start, end in found.spans] == ["Ho.<|end|>", "<b>Fine</b><|end|>"]
    assert found.dropped == 1
    last = rendered(tokenizer, PROMPTED, turns[:2])
    assert last.text.endswith("<|assistant|>\n<think>\nA\n</think>\n\nHo.<|end|>")
    assert [last.text[start:end] for start, end in last.spans] == ["A\n</think>\n\nHo.<|end|>"]


def test_a_template_without_generation_prompt_or_end(tokenizer: Any) -> None:
    turns = talk("Hi", "Ho.", "And?", "Fine.")
    assert labels(tokenizer, UNPROMPTED, turns) == [" Ho.", " Fine."]


def test_turns_that_a_template_moves(tokenizer: Any) -> None:
    """The system turn stands in the last question."""
    moved = (
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[INST]' }}"
        "{% if loop.index0 >= messages | length - 3 %}{{ messages[0].content + '\n' }}{% endif %}"
        "{{ m.content + '[/INST]' }}{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    )
    turns = [{"role": "system", "content": "Be brief."}, *talk("Hi", "Ho.", "And?", "Fine.")]
    found = rendered(tokenizer, moved, turns)
    assert found.text == "[INST]Hi[/INST]Ho.</s>[INST]Be brief.\nAnd?[/INST]Fine.</s>"
    assert [found.text[start:end] for start, end in found.spans] == ["Ho.</s>", "Fine.</s>"]


def test_a_template_that_looks_at_the_turns(tokenizer: Any) -> None:
    """Marks would change what it writes: fewer of them, then renderings up to each answer."""
    looking = CHATML.replace(
        "message['content'] +",
        "('!' if message['content'].startswith('<b>') else '') + message['content'] +",
    )
    turns = talk("<b>Hi</b>", "<b>Ho</b>", "<b>And", "Fine.")
    assert labels(tokenizer, looking, turns) == ["!<b>Ho</b><|im_end|>", "Fine.<|im_end|>"]
    counting = CHATML.replace("message['content'] +", "message['content'] | length ~ ':' + message['content'] +")
    assert labels(tokenizer, counting, turns) == ["9:<b>Ho</b><|im_end|>", "5:Fine.<|im_end|>"]
    shouting = CHATML.replace("message['content'] +", "message['content'] | upper + message['content'] | length ~")
    with pytest.raises(RowError, match="row 1: the chat template rewrites turn 2") as error:
        labels(tokenizer, shouting, turns)
    assert error.value.kind == "turns rewritten"


def test_a_cut_answer_ends_with_its_text(tokenizer: Any) -> None:
    turns = talk("Hi", "Ho. ", "And?", "Fine. ")
    for template, ends in ((CHATML, ["Ho. ", "Fine. "]), (LLAMA2, [" Ho. ", " Fine. "]), (GLM, ["\nHo. ", "\nFine. "])):
        assert labels(tokenizer, template, turns, cut=frozenset({1, 3})) == ends
    assert labels(tokenizer, CHATML, talk("Hi", ""), cut=frozenset({1})) == []


def test_prompts_that_a_row_asks_for_by_itself(tokenizer: Any) -> None:
    """The header is that of the row: here an empty think block, asked for in its system turn."""
    toggled = (
        "{% set quiet = '/quiet' in messages[0].content %}"
        + CHATML.replace(
            "message['content'] +", "(b if message.role == 'assistant' and quiet else '') + message['content'] +"
        )
        + "{% if add_generation_prompt and quiet %}{{ b }}{% endif %}"
    )
    toggled = "{% set b = '<think></think>' %}" + toggled
    turns = talk("Hi", "Ho.", "And?", "Fine.")
    for asked in ("/quiet", "Hum"):
        own = labels(tokenizer, toggled, [{"role": "system", "content": asked}, *turns])
        assert own == ["Ho.<|im_end|>", "Fine.<|im_end|>"]


def test_renderings_grow_with_the_row_and_not_with_its_square(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = chat_of(tokenizer, THINKING)
    lengths: list[int] = []
    render = Renderer.render

    def counted(self: Renderer, turns: list[Turn], *, open_answer: bool = False) -> str:
        lengths.append(len(turns))
        return render(self, turns, open_answer=open_answer)

    monkeypatch.setattr(Renderer, "render", counted)
    found = chat.conversation(Conversation(turns=talk(*["Hi", "Ho."] * 100)), "row 1")
    assert len(found.spans) == 100
    assert sum(lengths) <= 2.5 * 200


def test_what_a_text_has_of_a_turn() -> None:
    turn = {"role": "assistant", "content": "<think>\nA\n</think>\n\nB ", "reasoning": " C ", "tool_calls": [CALL]}
    assert pieces(turn) == ["A", "B"]
    assert said(turn, "<think>A</think>B")
    assert not said(turn, "B")
    assert complete(turn, "C and look")
    assert not complete(turn, "look")
    assert not complete(turn, "C")
    assert complete({**turn, "tool_calls": [{"id": "call7", "name": "x"}]}, "C call7")
    assert complete({"role": "assistant", "content": "", "tool_calls": ["look", {"function": None}]}, "")
    assert trailing("a \n") == " \n"
