"""What the labels of a conversation are, by renderings of the template alone: nothing of specd finds them here.

- rendered up to an answer, with the prompt that opens it, and with it: what the second has behind the first;
- where a template writes the history in another way than it wrote the last answer (thoughts left out, the system turn
  moved): the answer as it stands there, found by writing other words in its place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from os.path import commonprefix
from pathlib import Path
from typing import Any

from families import Family, write_family
from specd.config.settings import DataConfig
from specd.data import forms
from specd.data.chat import Chat, Rendered
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

    def __init__(self, family: Family, directory: Path, **options: Any) -> None:
        """options: variables for the template, as enable_thinking."""
        self.family, self.options = family, options
        self.tokenizer: Any = load_tokenizer(write_family(family, directory))
        self.chat = Chat(self.tokenizer, options)
        self.encoder = Encoder(self.tokenizer)
        self.config = DataConfig(path="rows.jsonl")
        self.right: dict[str, list[str]] = {}

    def plain(self, turns: list[dict[str, Any]], tools: Any, opened: bool = False) -> str | None:
        """The template's text of `turns`; None when it refuses them."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=opened, **self.options
            )
        except Exception:  # noqa: BLE001 - whatever a template raises
            return None
        return text

    def rendered(self, talk: Talk) -> Rendered:
        form = forms.read(as_row(talk), "row 1", self.config)
        assert isinstance(form, forms.Conversation)
        return self.chat.conversation(form, "row 1")


def places(turns: list[dict[str, Any]]) -> list[int]:
    return [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]


def without_end(text: str, ends: tuple[str, ...]) -> str:
    """What stands before the end token, or tokens, at the end of `text`, which ends with an answer."""
    end = "|".join(map(re.escape, ends))
    found = re.search(rf"(?:\s*(?:{end}))+\s*\Z", text)
    return text.rstrip() if found is None else text[: found.start()]


def behind_the_prompt(target: Target, talk: Talk, place: int) -> str | None:
    """The answer at `place` where the conversation up to it stands in the whole one; None where it does not."""
    turns, tools = talk
    whole, asked = target.plain(turns, tools), target.plain(turns[:place], tools, opened=True)
    told = target.plain(turns[: place + 1], tools)
    if whole is None or asked is None or told is None or not told.startswith(asked):
        return None
    said = without_end(told[len(asked) :], target.family.ends)
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
    if name in target.right:
        return target.right[name]
    found = []
    for place in places(talk[0]):
        text = behind_the_prompt(target, talk, place)
        text = as_it_stands(target, talk, place) if text is None else text
        found.append((text or "").removeprefix(target.family.rest))
    target.right[name] = [text for text in found if text]
    return target.right[name]


def taken(target: Target) -> Iterator[tuple[str, Talk]]:
    """The conversations that the family's template takes."""
    for name, talk in talks(target.family).items():
        if name not in target.family.refuses:
            yield name, talk
