"""Where the assistant's answers begin and end in a rendered conversation."""

from __future__ import annotations

import re
from typing import Any

from specd.data.faults import RowError
from specd.data.forms import Turn
from specd.data.frame import Frame, shared
from specd.data.marks import THOUGHTS, Mark, Marked
from specd.data.template import Renderer, Span


class Layout:
    """A rendered conversation with its marks. Answers are asked for by their place, in order."""

    __slots__ = ("_first", "_frame", "_headers", "_last", "_marked", "_marks", "_open", "_row", "_turns", "text")

    def __init__(
        self, text: str, turns: list[Turn], marked: Marked, marks: list[Mark], frame: Frame,
        row: Renderer, *, open_answer: bool = False,
    ) -> None:  # fmt: skip
        """row: the template that wrote `text`. open_answer: `text` ends where the target's answer begins."""
        self.text, self._turns, self._marked, self._marks, self._frame = text, turns, marked, marks, frame
        self._row, self._open = row, open_answer
        self._headers: dict[Any, str | None] = {}
        self._first: dict[int, int] = {}
        self._last: dict[int, int] = {}
        for number, mark in enumerate(marks):
            if not mark.again:
                self._first.setdefault(mark.turn, number)
                self._last[mark.turn] = number

    def region(self, place: int) -> Span:
        """From the end of the text before the answer to the begin of the text behind it."""
        first = self._first.get(place)
        if first is None:
            before = next((self._last[turn] for turn in range(place - 1, -1, -1) if turn in self._last), None)
            start = 0 if before is None else self._marks[before].at
            later = (self._first[turn] for turn in range(place + 1, len(self._turns)) if turn in self._first)
            return start, next((at for number in later if (at := self._marks[number].at) >= start), len(self.text))
        last = first
        while last < len(self._marks) and self._marks[last].turn == place:
            last += 1
        start = self._marks[first - 1].at if first else 0
        return start, self._marks[last].at if last < len(self._marks) else len(self.text)

    def own(self, place: int) -> Span | None:
        """From the first to the last mark of the turn, within its region."""
        first = self._first.get(place)
        if first is None:
            return None
        start = end = self._marks[first].at
        while first < len(self._marks) and self._marks[first].turn == place:
            if not self._marks[first].again:
                end = self._marks[first].at
            first += 1
        return start, end

    def answer(self, place: int, *, cut: bool) -> Span | None:
        """The characters of the answer that the target writes; None where the template leaves it out.

        cut: the answer stopped at a length limit, so that the target did not write its end.
        """
        own = self.own(place)
        if own is None and place not in self._marked.unmarked and self._turns[place]["content"].strip():
            return None
        begin = self._begin(place, own)
        if begin is None:
            return None
        return begin, max(begin, self._end(place, max(begin, own[1] if own else 0), cut=cut))

    def _begin(self, place: int, own: Span | None) -> int | None:
        start, limit = self.region(place)
        limit = own[0] if own else limit
        frame, text = self._frame, self.text
        header = self._header(place)
        if header is not None:
            space = trailing(self._turns[place - 1]["content"])
            begins = [start + n for n in range(len(space), -1, -1) if text.startswith(space[:n], start)]
            for begin in begins:
                if text.startswith(header, begin):
                    return self._behind(begin + len(header), limit)
            for begin in begins:
                found = begin + shared(header, [text[begin:limit]], frame.tokens)
                if found > begin + len(header) - len(frame.generation) and self._follows(place, found, own):
                    return found
        for known in (frame.generation, *frame.leads, frame.header):
            at = text.rfind(known, start, limit) if own else text.find(known, start, limit)
            if known and at >= 0:
                return self._behind(at + len(known), limit)
        if own is None:
            return None
        while limit > start and text[limit - 1] == " ":
            limit -= 1
        return limit

    def _follows(self, place: int, at: int, own: Span | None) -> bool:
        """Whether the answer stands at `at`, but for white space: its text, or the end token of an empty one."""
        if own is None:
            end = self._frame.end.search(self.text, at, self.region(place)[1])
            return end is not None and not self.text[at : end.start()].strip()
        before = self.text[at : own[0]].strip()
        taken_apart = own[0] == own[1] and any(before.startswith(first) for first in pieces(self._turns[place])[:1])
        return not before or taken_apart

    def _behind(self, begin: int, limit: int) -> int:
        """`begin`, behind a generation prompt, or behind the rest of its header if that follows."""
        rest = self._frame.rest
        if rest and begin + len(rest) <= limit and self.text.startswith(rest, begin):
            return begin + len(rest)
        return begin

    def _header(self, place: int) -> str | None:
        """What the template writes behind the turns before the answer when it asks for one."""
        turns, marks = self._turns, self._marks
        first = self._first.get(place)
        before = place - 1
        if first is not None:
            before = marks[first - 1].turn if first else -1
        else:
            while before >= 0 and before not in self._last:
                before -= 1
        if before < 0:
            return None
        between = tuple((turn["role"], turn["content"]) for turn in turns[before + 1 : place])
        kind = (turns[before]["role"], between)
        if kind not in self._headers:
            self._headers[kind] = self._asked(place, before)
        return self._headers[kind]

    def _asked(self, place: int, before: int) -> str | None:
        turns = self._marked.turns[:place]
        turns[-1] = {**turns[-1], "content": turns[-1]["content"].rstrip()}
        try:
            opened = self._row.render(turns, open_answer=True)
        except RowError:
            return None
        text, marks = self._marked.read(opened)
        return text[marks[-1].at :] if marks and marks[-1].turn == before else None

    def _end(self, place: int, at: int, *, cut: bool) -> int:
        """The end of the answer whose texts end at character `at`, its end token included."""
        text, frame = self.text, self._frame
        limit = max(at, self.region(place)[1])
        space = trailing(self._turns[place]["content"])
        while space and not text.startswith(space, at):
            space = space[:-1]
        content = at + len(space)
        found = frame.end.search(text, at, limit)
        if cut:
            return content if place in self._first or not found else at + len(text[at : found.start()].rstrip())
        if found:
            return found.end()
        if place == len(self._turns) - 1 and not self._open:
            return max(content, len(text.rstrip()))
        # No end token: the answer ends where the next turn begins.
        found = frame.begins.search(text, at, limit) or frame.structure.search(text, at, limit)
        return max(content, at + len(text[at : found.start()].rstrip())) if found else content


def trailing(text: str) -> str:
    """The white space that `text` ends with."""
    return text[len(text.rstrip()) :]


_TAG = re.compile(r"</?[\w:|]+>|\[/?[A-Z_]+\]|◁/?\w+▷")


def pieces(turn: Turn) -> list[str]:
    """The texts of the turn's content, between tags as <think>: where a template may take it apart."""
    return [piece.strip() for piece in _TAG.split(turn["content"]) if piece.strip()]


def said(turn: Turn, text: str) -> bool:
    """Whether `text` has all of the turn's content; thoughts in it may stand apart from the rest."""
    return turn["content"].strip() in text or all(piece in text for piece in pieces(turn))


def complete(turn: Turn, text: str) -> bool:
    """Whether `text` has what stands beside the turn's content: its thoughts, and its calls by a name or an id."""
    thoughts = (found for key in THOUGHTS if isinstance(found := turn.get(key), str))
    calls = turn.get("tool_calls")
    known = (_names(call) for call in calls if isinstance(call, dict)) if isinstance(calls, list) else ()
    return all(found.strip() in text for found in thoughts) and all(
        not names or any(name in text for name in names) for names in known
    )


def _names(call: dict[str, Any]) -> list[str]:
    function = call.get("function")
    named = function if isinstance(function, dict) else call
    return [found for found in (named.get("name"), call.get("id")) if isinstance(found, str)]
