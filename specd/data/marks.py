"""Marks in the texts of a conversation, to see where the chat template writes each of them.

A mark is one character of a private plane of Unicode. It stands behind the white space that a text begins with and
before the one it ends with, so that templates which trim, split or join texts do what they do without it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

from specd.data.forms import Turn

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn that hold thoughts."""

_PRIVATE = re.compile("[\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
_PLANES = (range(0x100000, 0x10FFFE), range(0xF0000, 0xFFFFE))


class Mark(NamedTuple):
    """A mark in a text without marks. at: before which character. turn: whose text begins or ends there.

    again: the template wrote the same text before.
    """

    at: int
    turn: int
    again: bool


class Marked:
    """Turns with marks. unmarked: places of turns without any."""

    __slots__ = ("_blank", "_codes", "_owners", "_plain", "_turn", "turns", "unmarked")

    def __init__(self, turns: list[Turn], text: str, *, blank: bool = True, plain: bool = False) -> None:
        """text: the conversation as the template writes it; its characters are no marks.

        blank: with marks in blank texts. plain: without those beside what templates look for at an end of a text, as
        <think>.
        """
        used = set(_PRIVATE.findall(text))
        codes: Iterator[int] = chain(*_PLANES)
        self._codes = (chr(code) for code in codes if chr(code) not in used) if used else map(chr, codes)
        self._owners: dict[str, int] = {}
        self._blank, self._plain = blank, plain
        self.turns: list[Turn] = []
        self.unmarked: set[int] = set()
        for self._turn, turn in enumerate(turns):
            before = len(self._owners)
            self.turns.append(self._marked(turn))
            if len(self._owners) == before:
                self.unmarked.add(self._turn)

    def read(self, text: str) -> tuple[str, list[Mark]]:
        """A rendering of these turns without its marks, and the marks in their order."""
        pieces: list[str] = []
        marks: list[Mark] = []
        seen: set[str] = set()
        at = last = 0
        for found in _PRIVATE.finditer(text):
            code = found.group()
            turn = self._owners.get(code)
            if turn is None:
                continue
            start = found.start()
            pieces.append(text[last:start])
            at += start - last
            last = start + 1
            marks.append(Mark(at, turn, code in seen))
            seen.add(code)
        pieces.append(text[last:])
        return "".join(pieces), marks

    def _marked(self, turn: Turn) -> Turn:
        result = dict(turn)
        if turn["role"] == "assistant":
            for key in THOUGHTS:
                if isinstance(turn.get(key), str) and turn[key].strip():
                    result[key] = self._wrapped(turn[key])
            if isinstance(turn.get("tool_calls"), list):
                result["tool_calls"] = [self._call(call) for call in turn["tool_calls"]]
        alone = result == turn
        if turn["content"].strip() or (alone and self._blank):
            result["content"] = self._wrapped(turn["content"])
        return result

    def _call(self, call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        result = dict(call)
        for key in ("name", "arguments"):
            if key in call:
                result[key] = self._leaves(call[key])
        if isinstance(call.get("function"), dict):
            result["function"] = self._call(call["function"])
        return result

    def _leaves(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._wrapped(value) if value.strip() else value
        if isinstance(value, dict):
            return {key: self._leaves(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._leaves(item) for item in value]
        return value

    def _wrapped(self, text: str) -> str:
        core = text.strip()
        begin = text.find(core) if core else 0
        end = begin + len(core)
        first = "" if self._plain and _looked_for(core.split(None, 1)[0]) else self._code()
        last = "" if self._plain and _looked_for(core.rsplit(None, 1)[-1]) else self._code()
        return text[:begin] + first + core + last + text[end:]

    def _code(self) -> str:
        """A new mark of the turn; none when there are no more, which leaves the rest unmarked."""
        code = next(self._codes, "")
        if code:
            self._owners[code] = self._turn
        return code


def _looked_for(word: str) -> bool:
    """Whether templates may look for this word at an end of a text: markup, /no_think, JSON."""
    return not (word[0].isalnum() and (word[-1].isalnum() or word[-1] in ".,;:!?"))
