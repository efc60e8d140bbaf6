"""The labels equal what stands behind the target's own generation prompt, for the templates of all families.

What is right is worked out here from renderings of the template alone, without specd:

- rendered up to an answer, with the prompt that opens it, and with it: what the second has behind the first;
- where a template writes the history in another way than it wrote the last answer (thoughts left out, the system turn
  moved): the answer as it stands there, found by writing other words in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest

from families import FAMILIES, Family, write_family
from specd.config.settings import DataConfig
from specd.data import forms
from specd.data.chat import Chat, Rendered
from specd.data.faults import RowError
from specd.data.forms import Conversation
from specd.data.tokenizer import Encoder, load_tokenizer
from talks import Talk, as_row, talks

R1_END = "<｜end▁of▁sentence｜>"
BY_HAND: dict[tuple[str, str], list[str]] = {
    # The template leaves the thoughts out of the last answer too, so that no rendering holds what the target wrote: it
    # begins behind <think>, and its words are the content's own.
    ("deepseek_r1", "thoughts in the content"): [
        f"\n\nBlue.{R1_END}",
        f"Plum comes to mind.\n</think>\n\nPlum.{R1_END}",
    ],
    # The prompt ends with an empty think block, which does not stand there. The text is the same as with the thoughts
    # apart, so that the labels are, too: from the thought's first word on.
    ("exaone4", "thoughts in the content"): [
        "Blue.[|endofturn|]",
        "Plum comes to mind.\n</think>\n\nPlum.[|endofturn|]",
    ],
}
"""Conversations whose labels no rendering tells, and why."""


class Target:
    """A family's tokenizer, and the chat of specd over it."""

    def __init__(self, family: Family, directory: Path) -> None:
        self.family = family
        self.tokenizer: Any = load_tokenizer(write_family(family, directory))
        self.chat = Chat(self.tokenizer)
        self.encoder = Encoder(self.tokenizer)
        self.config = DataConfig(path="rows.jsonl")

    def plain(self, turns: list[dict[str, Any]], tools: Any, opened: bool = False) -> str | None:
        """The template's text of `turns`; None when it refuses them."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=opened
            )
        except Exception:  # noqa: BLE001 - whatever a template raises
            return None
        return text

    def rendered(self, talk: Talk) -> Rendered:
        form = forms.read(as_row(talk), "row 1", self.config)
        assert isinstance(form, forms.Conversation)
        return self.chat.conversation(form, "row 1")


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Family], Target]:
    home, known = tmp_path_factory.mktemp("families"), dict[str, Target]()

    def give(family: Family) -> Target:
        if family.name not in known:
            known[family.name] = Target(family, home / family.name)
        return known[family.name]

    return give


def places(turns: list[dict[str, Any]]) -> list[int]:
    return [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]


def shortened(text: str, ends: tuple[str, ...]) -> tuple[str, str]:
    """What the target writes of `text`, which ends with an answer: the answer and its end token, "" without one."""
    end = "|".join(map(re.escape, ends))
    found = re.search(rf"(\s*(?:{end}))(?:\s*(?:{end}))*\s*\Z", text)
    if found is None:
        return text.rstrip(), ""
    return text[: found.start()], found[1]


def behind_the_prompt(target: Target, talk: Talk, place: int) -> str | None:
    """The answer at `place` where the conversation up to it stands in the whole one; None where it does not."""
    turns, tools = talk
    whole, asked = target.plain(turns, tools), target.plain(turns[:place], tools, opened=True)
    told = target.plain(turns[: place + 1], tools)
    if whole is None or asked is None or told is None or not told.startswith(asked):
        return None
    said, _ = shortened(told[len(asked) :], target.family.ends)
    if not whole.startswith(asked + said):
        return None
    after = whole[len(asked) + len(said) :]
    ends = "|".join(map(re.escape, target.family.ends))
    found = re.match(rf"\s*(?:{ends})", after)
    return said + (found[0] if found else "")


KEPT = ("role", "id", "type", "name")
"""Keys of a turn whose words other turns repeat."""


def reworded(value: Any, word: str) -> Any:
    """A turn with other words: its content, its thoughts and the arguments of its calls."""
    if isinstance(value, dict):
        return {name: item if name in KEPT else reworded(item, word) for name, item in value.items()}
    if isinstance(value, list):
        return [reworded(item, word) for item in value]
    return word if isinstance(value, str) else value


def others(target: Target, talk: Talk, place: int) -> Iterator[str | None]:
    """The conversation with other words in the answer at `place`, twice; an empty content gets some if it may."""
    turns, tools = talk
    for word in ("qqqq", "zzzz"):
        turn = reworded(turns[place], word)
        text = target.plain([*turns[:place], turn, *turns[place + 1 :]], tools)
        kept = {**turn, "content": turns[place]["content"]}
        yield text if text is not None else target.plain([*turns[:place], kept, *turns[place + 1 :]], tools)


def as_it_stands(target: Target, talk: Talk, place: int) -> str | None:
    """The answer at `place` as the whole conversation has it; None where it has none of it."""
    turns, tools = talk
    whole = target.plain(turns, tools)
    first, second = others(target, talk, place)
    if whole is None or first is None or second is None or first == second:
        return None
    if whole == target.plain([*turns[:place], *turns[place + 1 :]], tools):
        return None
    common = commonprefix([first, second])  # noqa: RUF071 - of texts, not of paths
    family = target.family
    headers = family.headers or (family.opening,)
    header = max((common.rfind(h) + len(h), h) for h in headers if h in common)
    begin = header[0]
    if family.opening and whole.startswith(family.opening, begin - len(header[1])):
        begin += len(family.opening) - len(header[1])
    elif family.opening and common[begin:].strip() and whole.startswith(common):
        begin = len(common)
    after = commonprefix([first[::-1], second[::-1]])[::-1]  # noqa: RUF071
    ends = "|".join(map(re.escape, family.ends))
    nearest = min((after.find(h) for h in headers if h in after and h not in family.ends), default=len(after))
    found = re.search(ends, after[: nearest + 1])
    until = len(whole) - len(after) + (found.end() if found else 0)
    return whole[begin:until]


def wanted(target: Target, name: str, talk: Talk) -> list[str]:
    if (target.family.name, name) in BY_HAND:
        return BY_HAND[target.family.name, name]
    found = []
    for place in places(talk[0]):
        text = behind_the_prompt(target, talk, place)
        text = as_it_stands(target, talk, place) if text is None else text
        found.append((text or "").removeprefix(target.family.rest))
    return [text for text in found if text]


def taken(target: Target) -> Iterator[tuple[str, Talk]]:
    """The conversations that the family's template takes."""
    for name, talk in talks(target.family).items():
        if name not in target.family.refuses:
            yield name, talk


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
        assert right[: right.index(said) + len(said)] in texts(rendered), place
        assert len(rendered.spans) == 3


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


@family
def test_a_text_that_went_through_the_template_has_the_same_labels(
    target: Callable[[Family], Target], family: Family
) -> None:
    model = target(family)
    for name, talk in taken(model):
        if name in ("one", "several", "open", "system", "said before", "other scripts"):
            rendered = model.chat.preformatted(model.plain(*talk) or "")
            assert not rendered.document
            assert texts(rendered) == wanted(model, name, talk), name
