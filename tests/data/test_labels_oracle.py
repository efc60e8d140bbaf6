"""The labels equal what stands behind the target's own generation prompt, for the templates of all families."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from families import FAMILIES, Family
from label_oracle import Target, as_it_stands, behind_the_prompt, places, taken, wanted
from specd.data.chat import Chat, Rendered
from specd.data.faults import RowError
from specd.data.forms import Conversation
from talks import Talk, answer, talks, user


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Target]:
    home, known = tmp_path_factory.mktemp("families"), dict[str, Target]()

    def give(family: Family) -> Target:
        if family.name not in known:
            known[family.name] = Target(family, home / family.name)
        return known[family.name]

    return give


def texts(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


def tokens_of(target: Target, rendered: Rendered) -> list[str]:
    """The texts under the loss mask, by the tokens' places in the text.

    A token that begins before an answer is none of its labels; the answer's first characters are given as they are.
    """
    ((ids, mask),) = target.encoder.encode([rendered])
    coded = target.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    assert coded["input_ids"] == ids.tolist()
    text = rendered.text
    reached = [begin for begin, _ in rendered.spans]
    for (start, end), label in zip(coded["offset_mapping"], mask.tolist(), strict=True):
        owner = next((n for n, (begin, until) in enumerate(rendered.spans) if begin < end and start < until), None)
        if owner is None:
            assert not label or start == end, (text[start:end], rendered.spans)
            continue
        begin, until = rendered.spans[owner]
        assert label == (begin <= start), text[start:end]
        assert start <= reached[owner], "a hole"
        assert end <= until, "a token that is a label goes beyond the answer"
        reached[owner] = end
    return [text[begin:end] for (begin, _), end in zip(rendered.spans, reached, strict=True)]


THINKING_OFF = {
    "glm4_5": "<|assistant|>\n<think></think>",
    "nemotron3": "<|im_start|>assistant\n<think></think>",
    "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "qwen3_5": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "smollm3": "<|im_start|>assistant\n<think>\n\n</think>\n",
}
"""Families with a switch for thoughts, and the generation prompt without."""


def differences(target: Target, found: Callable[[Talk], list[str]]) -> dict[str, tuple[list[str], list[str]]]:
    """Conversations whose labels are not right, each with (found, right)."""
    wrong: dict[str, tuple[list[str], list[str]]] = {}
    for name, talk in taken(target):
        right = wanted(target, name, talk)
        labels = found(talk)
        if labels != right:
            wrong[name] = labels, right
    return wrong


family = pytest.mark.parametrize("family", FAMILIES, ids=str)


@family
def test_labels_are_what_stands_behind_the_prompt(target: Callable[[Family], Target], family: Family) -> None:
    model = target(family)
    assert differences(model, lambda talk: texts(model.rendered(talk))) == {}


@family
def test_tokens_under_the_mask_are_those_behind_the_prompt(target: Callable[[Family], Target], family: Family) -> None:
    model = target(family)
    assert differences(model, lambda talk: tokens_of(model, model.rendered(talk))) == {}


@pytest.mark.parametrize("name", THINKING_OFF)
def test_an_empty_think_block_of_the_prompt_is_no_label(name: str, tmp_path: Path) -> None:
    usual = next(family for family in FAMILIES if family.name == name)
    headers = usual.headers or (usual.opening,)
    family = msgspec.structs.replace(usual, opening=THINKING_OFF[name], headers=headers)
    model = Target(family, tmp_path, enable_thinking=False)
    assert (model.plain(*talks(family)["open"], opened=True) or "").endswith(family.opening)
    for conversation, talk in taken(model):
        if not conversation.startswith("thoughts"):
            assert texts(model.rendered(talk)) == wanted(model, conversation, talk), conversation


@family
def test_a_row_whose_turns_the_template_refuses_is_named(target: Callable[[Family], Target], family: Family) -> None:
    model = target(family)
    refused = {name for name, (turns, tools) in talks(family).items() if model.plain(turns, tools) is None}
    assert refused == family.refuses
    for name in refused:
        with pytest.raises(RowError, match=r"row 1: the chat template refuses it"):
            model.rendered(talks(family)[name])


@family
def test_both_ways_to_know_the_labels_agree(target: Callable[[Family], Target], family: Family) -> None:
    model = target(family)
    for name, talk in taken(model):
        for place in places(talk[0]):
            told = behind_the_prompt(model, talk, place)
            if told is not None:
                assert as_it_stands(model, talk, place) == told, (name, place)


@family
def test_an_answer_that_was_cut_ends_with_its_words(target: Callable[[Family], Target], family: Family) -> None:
    model = target(family)
    talk = talks(family)["several"]
    for place, right in zip(places(talk[0]), wanted(model, "several", talk), strict=True):
        said = talk[0][place]["content"]
        rendered = model.chat.conversation(Conversation(turns=talk[0], cut=frozenset({place})), "row 1")
        unfinished = place == len(talk[0]) - 1 and family.opening.endswith("<think>\n")
        assert (said if unfinished else right[: right.index(said) + len(said)]) in texts(rendered), place
        assert len(rendered.spans) == 3


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.opening.endswith("<think>\n")], ids=str)
def test_an_answer_that_was_cut_in_its_thoughts_stands_behind_the_prompt(
    target: Callable[[Family], Target], family: Family
) -> None:
    model = target(family)
    colour = {"role": "user", "content": "Name a colour."}
    prompt = model.plain([colour], None, opened=True)
    for content in ("They want one, so", "<think>\nThey want one, so"):
        turns = [colour, {"role": "assistant", "content": content}]
        rendered = model.chat.conversation(Conversation(turns=turns, cut=frozenset({1})), "row 1")
        assert rendered.text == f"{prompt}They want one, so"
        assert texts(rendered) == ["They want one, so"]


@family
def test_an_answer_that_is_context_is_no_label(target: Callable[[Family], Target], family: Family) -> None:
    model = target(family)
    talk = talks(family)["several"]
    right = wanted(model, "several", talk)
    for number, place in enumerate(places(talk[0])):
        rendered = model.chat.conversation(Conversation(turns=talk[0], context=frozenset({place})), "row 1")
        assert texts(rendered) == right[:number] + right[number + 1 :]
    rendered = model.chat.conversation(Conversation(turns=talk[0]), "row 1", last_turn_only=True)
    assert texts(rendered) == right[-1:]


def test_answers_beside_texts_that_look_like_markup_are_told_apart(target: Callable[[Family], Target]) -> None:
    model = target(next(family for family in FAMILIES if family.name == "glm4_5"))
    turns = [user("`"), answer(""), user("\u200b"), answer("`"), user("\u200b"), answer("#")]
    rendered = model.chat.conversation(Conversation(turns=turns), "row 1")
    assert texts(rendered) == [as_it_stands(model, (turns, None), place) for place in (1, 3, 5)]
    (last,) = texts(model.chat.conversation(Conversation(turns=turns), "row 1", last_turn_only=True))
    assert last.endswith("#")


def loses(target: Target, talk: Talk, place: int, text: str) -> bool:
    """Whether `text` lacks the answer at `place`, its thoughts or its calls."""
    (turns, tools), turn = talk, talk[0][place]
    uncalled = {key: value for key, value in turn.items() if key != "tool_calls"}
    if "tool_calls" in turn and text == target.plain([*turns[:place], uncalled, *turns[place + 1 :]], tools):
        return True
    pieces = [turn.get(target.family.thought), *re.split(r"</?think>", turn["content"])]
    if any(piece and piece.strip() not in text for piece in pieces):
        return True
    return behind_the_prompt(target, talk, place) is None and as_it_stands(target, talk, place) is None


@family
def test_answers_that_lost_words_are_counted(target: Callable[[Family], Target], family: Family) -> None:
    model = target(family)
    wrong = {}
    for name, talk in taken(model):
        rendered = model.rendered(talk)
        lost = sum(loses(model, talk, place, rendered.text) for place in places(talk[0]))
        if rendered.dropped != lost:
            wrong[name] = rendered.dropped, lost
    assert wrong == {}


AMBIGUOUS = {
    # Words of a turn that look like the template's own, and answers without a header before them or without a word.
    "": ("looks like the template", "assistant first", "two answers", "empty"),
    # What a tool gave stands under the header of an answer.
    "alpaca": ("call", "call and words", "several calls", "thoughts and calls"),
    "vicuna": ("call", "call and words", "several calls", "thoughts and calls"),
    # The prompt is another one than that of the answer, and the text does not tell where the content began.
    "exaone4": ("thoughts", "thoughts in the content", "thoughts and calls"),
    # Its text is written anew from the content.
    "deepseek_r1": ("thoughts in the content",),
}
"""Conversations whose text alone does not tell the labels, for all families ("") and for some."""


@family
def test_a_text_that_went_through_the_template_has_the_same_labels(
    target: Callable[[Family], Target], family: Family
) -> None:
    model = target(family)
    wrong = {}
    for name, talk in taken(model):
        if name in AMBIGUOUS[""] or name in AMBIGUOUS.get(family.name, ()):
            continue
        rendered = model.chat.preformatted(model.plain(*talk) or "")
        if rendered.document or texts(rendered) != wanted(model, name, talk):
            wrong[name] = texts(rendered), wanted(model, name, talk)
    assert wrong == {}


@family
def test_a_template_that_asks_for_the_clock_is_told_one_day(target: Callable[[Family], Target], family: Family) -> None:
    tokenizer = target(family).tokenizer
    days = [Chat(tokenizer, date=day) for day in ("2026-01-31", "2027-02-01", "2026-01-31")]
    first, second, again = (chat.render(talks(family)["one"][0]) for chat in days)
    assert first == again
    assert {chat.asks_clock for chat in days} == {first != second}
