"""Whatever people and targets say: the labels are the answers and their ends, and nothing of anybody else."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from families import Family, write_family
from specd.data.chat import Chat
from specd.data.forms import Conversation, Turn
from specd.data.tokenizer import Encoder, load_tokenizer

Piece = tuple[str, bool]
"""A part of a rendered conversation, and whether the target writes it."""

CHATML = Family(
    name="chatml",
    opening="<|im_start|>assistant\n",
    ends=("<|im_end|>",),
    eos="<|im_end|>",
    extra=("<|im_start|>", "<|im_end|>"),
    plain=("<tool_call>", "</tool_call>"),
    template=(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for call in m.tool_calls or [] %}"
        "{{ '<tool_call>' + call.function.name + call.function.arguments | tojson + '</tool_call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
)
LLAMA2 = Family(
    name="llama2",
    opening="",
    ends=("</s>",),
    bos="<s>",
    eos="</s>",
    template=(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
        "{% else %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
)
GLM = Family(
    name="glm",
    opening="<|assistant|>",
    ends=("<|user|>", "<|observation|>"),
    eos="<|endoftext|>",
    extra=("[gMASK]", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    template=(
        "[gMASK]{% for m in messages %}{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\n' }}"
        "{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ '\n' + call.function.name + call.function.arguments | tojson }}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    ),
)


def chatml(turns: list[Turn]) -> list[Piece]:
    pieces = []
    for turn in turns:
        mine = turn["role"] == "assistant"
        calls = "".join(f"<tool_call>{name}{given}</tool_call>" for name, given in called(turn))
        pieces += [
            (f"<|im_start|>{turn['role']}\n", False),
            (turn["content"] + calls + "<|im_end|>", mine),
            ("\n", False),
        ]
    return pieces


def llama2(turns: list[Turn]) -> list[Piece]:
    pieces = []
    for turn in turns:
        said = turn["content"].strip()
        pieces.append((f" {said} </s>", True) if turn["role"] == "assistant" else (f"<s>[INST] {said} [/INST]", False))
    return pieces


def glm(turns: list[Turn]) -> list[Piece]:
    pieces = [("[gMASK]", False)]
    ended = False
    for turn, after in pairwise([*turns, None]):
        assert turn is not None
        role = {"tool": "observation"}.get(turn["role"], turn["role"])
        calls = "".join(f"\n{name}{given}" for name, given in called(turn))
        said = f"\n{turn['content']}{calls}"
        mine = turn["role"] == "assistant"
        if not ended:
            pieces.append((f"<|{role}|>", False))
        ended = mine and after is not None and after["role"] in ("user", "tool")
        pieces.append((said, mine))
        if ended and after is not None:
            pieces[-1] = (said + ("<|observation|>" if after["role"] == "tool" else "<|user|>"), True)
    return pieces


def called(turn: Turn) -> list[tuple[str, str]]:
    """Name and arguments, as JSON, of each call of a turn."""
    functions = [call["function"] for call in turn.get("tool_calls") or []]
    return [(function["name"], json.dumps(function["arguments"], ensure_ascii=False)) for function in functions]


WRITERS: dict[str, tuple[Family, Callable[[list[Turn]], list[Piece]]]] = {
    "chatml": (CHATML, chatml),
    "llama2": (LLAMA2, llama2),
    "glm": (GLM, glm),
}

LOOKALIKES = [
    "<|im_start|>", "<|im_end|>", "<|im_start|>assistant\n", "<|assistant|>", "<|user|>", "<|observation|>", "[INST] ",
    " [/INST]", "<s>", "</s>", "assistant", "\n", " ", "\t", "<tool_call>", "{{ messages }}", "{% generation %}",
    "Blue", " Blue.", "e\u0301", "🙂", "\ufeff", "\u200b", "\u00a0", "\U000f0000", "\U000f0001", "\U00100000", "\ue000",
]  # fmt: skip
CONTENTS = st.lists(st.sampled_from(LOOKALIKES) | st.text(max_size=6), max_size=5).map("".join)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": st.sampled_from(["weather", "f"]), "arguments": st.dictionaries(st.just("town"), CONTENTS)}
            ),
        }
    ),
    min_size=1,
    max_size=2,
)


def turn(role: str) -> st.SearchStrategy[Turn]:
    said: dict[str, st.SearchStrategy[Any]] = {"role": st.just(role), "content": CONTENTS}
    return st.fixed_dictionaries(said)


CALLING = st.fixed_dictionaries({"role": st.just("assistant"), "content": CONTENTS, "tool_calls": CALLS})
FREE = st.lists(
    turn("user") | turn("assistant") | turn("assistant") | turn("tool") | turn("system") | CALLING,
    min_size=1,
    max_size=8,
)
"""Turns in any order."""
TAKING_TURNS = st.integers(1, 8).flatmap(
    lambda count: st.tuples(*(turn("assistant" if place % 2 else "user") for place in range(count))).map(list)
)
CONVERSATIONS = {"chatml": FREE, "llama2": TAKING_TURNS, "glm": FREE}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Chat, Encoder]]:
    home = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name, (family, _) in WRITERS.items():
        tokenizer = load_tokenizer(write_family(family, home / name))
        found[name] = Chat(tokenizer), Encoder(tokenizer)
    return found


def bare(text: str, family: Family) -> str:
    """A label; where it has no end token, whether the white space at its end is one does not matter."""
    return text if text.endswith(family.ends) else text.rstrip()


def labels_are_the_answers(
    chat: Chat, encoder: Encoder, turns: list[Turn], family: Family, pieces: list[Piece]
) -> None:
    rendered = chat.conversation(Conversation(turns=turns), "row 1")
    assert rendered.text == "".join(text for text, _ in pieces)
    right, at = [], 0
    for text, mine in pieces:
        if mine:
            right.append((at, at + len(bare(text, family))))
        at += len(text)
    found = [(start, start + len(bare(rendered.text[start:end], family))) for start, end in rendered.spans]
    assert [span for span in found if span[0] < span[1]] == [span for span in right if span[0] < span[1]]
    ((tokens, mask),) = encoder.encode([rendered])
    coded: Any = encoder.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    assert coded["input_ids"] == tokens.tolist()
    for (start, end), label in zip(coded["offset_mapping"], mask.tolist(), strict=True):
        assert label == any(begin <= start < until for begin, until in rendered.spans)
        assert not label or any(begin <= start and end <= until for begin, until in rendered.spans)


@pytest.mark.parametrize("name", WRITERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_labels_are_the_answers(chats: dict[str, tuple[Chat, Encoder]], name: str, data: st.DataObject) -> None:
    turns = data.draw(CONVERSATIONS[name])
    family, write = WRITERS[name]
    labels_are_the_answers(*chats[name], turns, family, write(turns))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
@given(data=st.data())
@settings(max_examples=3400, deadline=None, derandomize=True, database=None)
def test_labels_are_the_answers_of_ten_thousand_conversations(
    chats: dict[str, tuple[Chat, Encoder]], name: str, data: st.DataObject
) -> None:
    turns = data.draw(CONVERSATIONS[name])
    family, write = WRITERS[name]
    labels_are_the_answers(*chats[name], turns, family, write(turns))
