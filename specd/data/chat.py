"""Conversations as a target sees them: the text that its chat template writes, and which characters are labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from specd.data.faults import RowError
from specd.data.forms import Conversation, Turn
from specd.data.frame import Frame, learn
from specd.data.labels import Layout, whole
from specd.data.marks import Marked
from specd.data.template import Span, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation or a document as text. spans: the characters that the target writes, which may be labels.

    document: the text never went through a template, so the tokenizer adds its own BOS. dropped: answers of which the
    template leaves out a part, as thoughts of earlier turns.
    """

    text: str
    spans: tuple[Span, ...]
    document: bool = False
    dropped: int = 0


def document(text: str) -> Rendered:
    """A plain text, all of it labels."""
    return Rendered(text=text, spans=((0, len(text)),), document=True)


class Chat:
    """The chat template of one tokenizer, and what it writes around an answer.

    asks_clock: the template writes the date, so that the same rows give other text on another day.
    """

    __slots__ = ("_frame", "_template", "_tokens", "asks_clock", "options", "tokenizer")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any] | None = None,
        *,
        date: str = "",
        ends: Iterable[int] = (),
    ) -> None:
        """options: variables for the template, as enable_thinking of Qwen3. date: the day it is told, as 2026-01-31.

        ends: ids that end an answer beside eos_token and those of the generation_config.json beside the tokenizer.
        Raises DataError for unusable templates.
        """
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        self._template = Template(tokenizer, self.options, date)
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        names = [tokenizer.convert_ids_to_tokens(i) for i in (*ends, *_configured(tokenizer)) if i < len(tokenizer)]
        specials = set(map(str, tokenizer.all_special_tokens))
        known = {name for name in names if isinstance(name, str) and name in added.keys() | specials}
        if tokenizer.eos_token:
            known.add(str(tokenizer.eos_token))
        self._frame: Frame = learn(self._template, added.keys() | specials, known)
        self._tokens = self._frame.tokens | specials | {token for token, special in added.items() if special}
        """Tokens that a plain document does not have."""
        fixed = self._template.mentions("date_string") and "date_string" in self.options
        self.asks_clock = self._template.told_the_day or (self._template.mentions("strftime_now") and not fixed)

    def render(
        self, turns: list[Turn], *, open_answer: bool = False, tools: Any = None, where: str = "a conversation"
    ) -> str:
        """The conversation as text; with `open_answer` up to where the target's answer begins.

        Raises RowError naming `where` when the template refuses it.
        """
        return self._template.render(turns, open_answer=open_answer, tools=tools, where=where)

    def conversation(self, talk: Conversation, where: str, *, last_turn_only: bool = False) -> Rendered:
        """`talk` as text, with the assistant's answers and their end tokens as labels.

        An answer that was cut off has no end token as a label: the target did not write it. A last answer of which the
        template leaves out a part stands as it was written. Raises RowError naming `where`.
        """
        answers = [
            place for place, turn in enumerate(talk.turns) if turn["role"] == "assistant" and place not in talk.context
        ]
        if last_turn_only:
            answers = answers[-1:]
        if self._template.marks_answers(talk.tools):
            return self._as_marked(talk, answers, where)
        rendered, lost = self._laid_out(talk.turns, answers, talk, where)
        last = len(talk.turns) - 1
        if last not in lost or not last or talk.turns[last].get("tool_calls"):
            return rendered
        before, _ = self._laid_out(talk.turns[:last], answers[:-1], talk, where, open_answer=True)
        written = _continued(before.text, talk.turns[last]["content"].rstrip())
        text = before.text + written + ("" if last in talk.cut else self._frame.closing)
        spans = (*before.spans, (len(before.text), len(text)))
        return Rendered(text=text, spans=spans, dropped=before.dropped)

    def _laid_out(
        self, turns: list[Turn], answers: list[int], talk: Conversation, where: str, *, open_answer: bool = False
    ) -> tuple[Rendered, list[int]]:
        """The text, with spans of `answers`, and the places of those of which the template leaves out a part."""
        text = self.render(turns, tools=talk.tools, open_answer=open_answer, where=where)
        layout = self._layout(text, turns, talk.tools, open_answer=open_answer)
        if layout is None:
            return self._in_steps(text, turns, answers, talk, where), []
        spans: list[Span] = []
        lost = []
        for place in answers:
            found = layout.answer(place, cut=place in talk.cut)
            if found and spans:
                found = max(found[0], spans[-1][1]), found[1]
            if found and found[0] < found[1]:
                spans.append(found)
            if not found or not whole(turns[place], text[slice(*layout.region(place))]):
                lost.append(place)
        return Rendered(text=text, spans=tuple(spans), dropped=len(lost)), lost

    def _layout(self, text: str, turns: list[Turn], tools: Any, *, open_answer: bool = False) -> Layout | None:
        """Where the texts of `turns` stand in `text`; None for a template that writes other text when it sees marks."""

        def prompt(asked: list[Turn]) -> str | None:
            try:
                return self.render(asked, tools=tools, open_answer=True)
            except RowError:
                return None

        for plain in (False, True):
            marked = Marked(turns, text, plain=plain)
            try:
                found, marks = marked.read(self.render(marked.turns, tools=tools, open_answer=open_answer))
            except RowError:
                continue
            if found == text:
                return Layout(text, turns, marked, marks, self._frame, prompt, open_answer=open_answer)
        return None

    def _in_steps(self, text: str, turns: list[Turn], answers: list[int], talk: Conversation, where: str) -> Rendered:
        """The answers by renderings up to each of them, for a template that looks at what the turns say."""
        spans: list[Span] = []
        for place in answers:
            asked = self.render(turns[:place], tools=talk.tools, open_answer=True, where=where) if place else ""
            content = turns[place]["content"].strip()
            begin = len(asked) if asked and text.startswith(asked) else text.find(content, spans[-1][1] if spans else 0)
            at = text.find(content, begin) if begin >= 0 else -1
            if at < 0:
                raise RowError(
                    where,
                    "turns rewritten",
                    f"the chat template rewrites turn {place + 1}, so that its characters cannot be told; use "
                    f"preformatted `text` data",
                )
            end = self._frame.end.search(text, at + len(content))
            spans.append((begin, at + len(content) if place in talk.cut or not end else end.end()))
        return Rendered(text=text, spans=tuple(spans))

    def _as_marked(self, talk: Conversation, answers: list[int], where: str) -> Rendered:
        """The text with the spans that the template itself marks, of `answers`."""
        text, spans = self._template.marked(talk.turns, tools=talk.tools, where=where)
        everyone = sum(turn["role"] == "assistant" for turn in talk.turns)
        if len(answers) == everyone and not talk.cut:
            return Rendered(text=text, spans=tuple(span for span in spans if span[0] < span[1]))
        layout = self._layout(text, talk.turns, talk.tools)
        if layout is None:
            raise RowError(
                where,
                "turns rewritten",
                "the chat template looks at what the turns say, so that an answer that was cut off, or is no label, "
                "cannot be told; use preformatted `text` data",
            )
        kept: list[Span] = []
        for place in answers:
            start, end = layout.region(place)
            own = [span for span in spans if start <= span[0] < end and span[0] < span[1]]
            if own and place in talk.cut:
                begin, stop = own[-1]
                found = layout.answer(place, cut=True)
                own[-1] = begin, max(begin, min(stop, found[1] if found else stop))
            kept += own
        return Rendered(text=text, spans=tuple(span for span in kept if span[0] < span[1]))

    def preformatted(self, text: str, *, last_turn_only: bool = False) -> Rendered:
        """A text that already went through the template: answers are found by their header and end token.

        A text without any special token is a plain document, and all of it is a label.
        """
        frame = self._frame
        spans: list[Span] = []
        at = text.find(frame.header) if frame.header else -1
        if at < 0 and not any(token in text for token in self._tokens):
            return document(text)
        while at >= 0:
            begin = at + len(frame.header)
            if text.startswith(frame.generation, at):
                begin = at + max(len(frame.generation), len(frame.header))
            if frame.generation and text.startswith(frame.rest, begin):
                begin += len(frame.rest)
            ended = frame.end.search(text, begin)
            end = ended.end() if ended else len(text)
            if begin < end:
                spans.append((begin, end))
            # A role's token that ends an answer may begin the next one.
            at = text.find(frame.header, max(begin, ended.start() if ended else end))
        return Rendered(text=text, spans=tuple(spans[-1:] if last_turn_only else spans))


def _continued(prompt: str, content: str) -> str:
    """What of `content` follows `prompt`, which may end with the tag that the content begins with."""
    space = prompt[len(prompt.rstrip()) :]
    bare = prompt.rstrip()
    said = content.lstrip()
    for length in range(min(len(bare), len(said)), 0, -1):
        if bare.endswith(said[:length]) and said[:length].endswith((">", "]")):
            return said[length:].removeprefix(space)
    return content


def _configured(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a text in the generation_config.json beside the tokenizer's files."""
    try:
        found = msgspec.json.decode(
            (Path(tokenizer.name_or_path) / "generation_config.json").read_bytes(), type=dict[str, Any]
        )
    except (OSError, ValueError, msgspec.MsgspecError):
        return []
    ids = found.get("eos_token_id")
    return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
