"""Conversations as a target sees them: the text that its chat template writes, and which characters are labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from specd.data.faults import RowError
from specd.data.forms import Conversation, Turn
from specd.data.frame import Frame, learn
from specd.data.images import Picture
from specd.data.labels import Layout, complete, said, trailing
from specd.data.marks import THOUGHTS, Marked
from specd.data.template import Renderer, Span, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation or a document as text. spans: the characters that the target writes, which may be labels.

    document: the text never went through a template, so the tokenizer adds its own BOS. dropped: answers of which the
    template leaves out a part, as thoughts of earlier turns. pictures: the images that it has a place for each of.
    """

    text: str
    spans: tuple[Span, ...]
    document: bool = False
    dropped: int = 0
    pictures: tuple[Picture, ...] = ()


def document(text: str, prompt: int = 0) -> Rendered:
    """A plain text, all of it labels. prompt: but for so many characters at its begin."""
    return Rendered(text=text, spans=((prompt, len(text)),) if prompt < len(text) else (), document=True)


class Chat:
    """The chat template of one tokenizer, and what it writes around an answer.

    asks_clock: the template writes the date, so that the same rows give other text on another day.
    """

    __slots__ = ("_frame", "_template", "asks_clock", "options", "tokenizer")

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
        added |= dict.fromkeys(map(str, tokenizer.all_special_tokens), True)
        names = [tokenizer.convert_ids_to_tokens(i) for i in (*ends, *_configured(tokenizer)) if i < len(tokenizer)]
        known = {name for name in names if isinstance(name, str) and name in added}
        if tokenizer.eos_token:
            known.add(str(tokenizer.eos_token))
        self._frame: Frame = learn(self._template, added, known)
        fixed = self._template.mentions("date_string") and "date_string" in self.options
        self.asks_clock = self._template.told_the_day or (self._template.mentions("strftime_now") and not fixed)

    def render(
        self,
        turns: list[Turn],
        *,
        open_answer: bool = False,
        tools: Any = None,
        options: Mapping[str, Any] | None = None,
        where: str = "a conversation",
    ) -> str:
        """The conversation as text; with `open_answer` up to where the target's answer begins.

        options: variables of the template for this conversation alone. Raises RowError naming `where` when the template
        refuses it.
        """
        return self._template.row(where, tools, options).render(turns, open_answer=open_answer)

    def conversation(self, talk: Conversation, where: str, *, last_turn_only: bool = False) -> Rendered:
        """`talk` as text, with the assistant's answers and their end tokens as labels.

        An answer that was cut off has no end token as a label: the target did not write it. A last answer that the
        template does not write whole stands behind the generation prompt as it was written. Raises RowError naming
        `where`.
        """
        row = self._template.row(where, talk.tools, talk.options, images=bool(talk.pictures))
        answers = [place for place, turn in enumerate(talk.turns) if turn["role"] == "assistant"]
        asked = [place for place in answers if place not in talk.context]
        if last_turn_only:
            asked = asked[-1:]
        if row.marks_answers:
            return self._as_marked(row, talk, asked, everyone=asked == answers and not talk.cut)
        rendered, lost = self._laid_out(row, talk, asked)
        last = len(talk.turns) - 1
        if last in lost or (last in talk.cut and last in asked):
            return self._as_written(row, talk, asked, rendered, whole=last not in lost)
        return rendered

    def _as_written(
        self, row: Renderer, talk: Conversation, asked: list[int], rendered: Rendered, *, whole: bool
    ) -> Rendered:
        """The last answer behind the generation prompt, where `rendered` has not what the target wrote there.

        A template may take thoughts out of it, so that it is not `whole`, or take one that was cut within its thoughts
        for one without.
        """
        last = len(talk.turns) - 1
        turn = talk.turns[last]
        if not last or not turn["content"].strip() or any(turn.get(key) for key in ("tool_calls", *THOUGHTS)):
            return rendered
        begun = msgspec.structs.replace(talk, turns=talk.turns[:last])
        before, _ = self._laid_out(row, begun, asked[:-1], open_answer=True)
        prompt = before.text
        if whole and not _within_thoughts(prompt, turn["content"]):
            return rendered
        text = prompt + _continued(prompt, turn["content"].rstrip()) + ("" if last in talk.cut else self._frame.closing)
        return Rendered(text=text, spans=(*before.spans, (len(prompt), len(text))), dropped=before.dropped)

    def _laid_out(
        self, row: Renderer, talk: Conversation, asked: list[int], *, open_answer: bool = False
    ) -> tuple[Rendered, list[int]]:
        """The text with spans of the answers at `asked`, and the places of those whose content it has not whole."""
        text = row.render(talk.turns, open_answer=open_answer)
        layout = self._layout(row, talk.turns, text, open_answer=open_answer)
        if layout is None:
            return self._in_steps(row, talk, text, asked), []
        spans: list[Span] = []
        lost = []
        dropped = 0
        for place in asked:
            found = layout.answer(place, cut=place in talk.cut)
            if found and spans:
                found = max(found[0], spans[-1][1]), found[1]
            if found and found[0] >= found[1]:
                found = None
            if found:
                spans.append(found)
            stands = text[slice(*layout.region(place))]
            if not said(talk.turns[place], stands):
                lost.append(place)
            dropped += found is None or place in lost or not complete(talk.turns[place], stands)
        return Rendered(text=text, spans=tuple(spans), dropped=dropped), lost

    def _layout(self, row: Renderer, turns: list[Turn], text: str, *, open_answer: bool = False) -> Layout | None:
        """Where the texts of `turns` stand in `text`; None for a template that writes other text when it sees marks."""
        for blank, plain in ((True, False), (False, False), (False, True)):
            marked = Marked(turns, text, blank=blank, plain=plain)
            try:
                found, marks = marked.read(row.render(marked.turns, open_answer=open_answer))
            except RowError:
                continue
            if found == text:
                return Layout(text, turns, marked, marks, self._frame, row, open_answer=open_answer)
        return None

    def _in_steps(self, row: Renderer, talk: Conversation, text: str, asked: list[int]) -> Rendered:
        """The answers by renderings up to each of them, for a template that looks at what the turns say."""
        spans: list[Span] = []
        for place in asked:
            prompt = row.render(talk.turns[:place], open_answer=True) if place else ""
            content = talk.turns[place]["content"].strip()
            begin = text.find(content, spans[-1][1] if spans else 0)
            if prompt and text.startswith(prompt):
                begin = len(prompt)
            at = text.find(content, begin) if begin >= 0 else -1
            if at < 0:
                raise _rewritten(row.where, f"rewrites turn {place + 1}")
            end = self._frame.end.search(text, at + len(content))
            spans.append((begin, at + len(content) if place in talk.cut or not end else end.end()))
        return Rendered(text=text, spans=tuple(spans))

    def _as_marked(self, row: Renderer, talk: Conversation, asked: list[int], *, everyone: bool) -> Rendered:
        """The text with the spans that the template itself marks, of the answers at `asked` or of `everyone`."""
        text, spans = row.marked(talk.turns)
        dropped = sum(not said(talk.turns[place], text) or not complete(talk.turns[place], text) for place in asked)
        if everyone:
            return Rendered(text=text, spans=tuple(spans), dropped=dropped)
        layout = self._layout(row, talk.turns, text)
        if layout is None:
            raise _rewritten(row.where, "looks at what the turns say")
        kept: list[Span] = []
        for place in asked:
            start, end = layout.region(place)
            own = [span for span in spans if start <= span[0] < end]
            found = layout.answer(place, cut=True) if own and place in talk.cut else None
            if found:
                own[-1] = own[-1][0], max(own[-1][0], min(own[-1][1], found[1]))
            kept += own
        return Rendered(text=text, spans=tuple(kept), dropped=dropped)

    def preformatted(self, text: str, *, last_turn_only: bool = False) -> Rendered:
        """A text that already went through the template: answers are found by their header and end token.

        A text without any special token is a plain document, and all of it is a label.
        """
        frame = self._frame
        spans: list[Span] = []
        found = frame.begins.search(text)
        if not found and not frame.structure.search(text):
            return document(text)
        whole = True
        while found:
            leads = (lead for lead in (frame.generation, *frame.leads) if lead and text.startswith(lead, found.start()))
            begin = found.start() + len(next(leads, found[0]))
            goes_on = not whole and found.start() == spans[-1][1]
            whole = text.startswith(frame.rest, begin)
            if whole and frame.generation and not goes_on:
                begin += len(frame.rest)
            ended, found = frame.end.search(text, begin), frame.begins.search(text, begin)
            end = ended.end() if ended else len(text)
            if found and not (ended and ended.start() <= found.start()):
                end = found.start()
            if goes_on:
                # Thoughts, or words before a call, that stand under a header of their own (gpt-oss).
                spans[-1] = spans[-1][0], end
            elif begin < end:
                spans.append((begin, end))
            if found and ended and ended.start() < found.start() < end:
                found = frame.begins.search(text, end)
        return Rendered(text=text, spans=tuple(spans[-1:] if last_turn_only else spans))


def _rewritten(where: str, what: str) -> RowError:
    return RowError(
        where,
        "turns rewritten",
        f"the chat template {what}, so that the answers' characters cannot be told; use preformatted `text` data",
    )


_OPENED = r"(<[\w:]+>|\[[A-Z_]+\]|◁\w+▷)"


def _continued(prompt: str, content: str) -> str:
    """What of `content` follows `prompt`, which may end with the tag that the content begins with."""
    begun = re.match(rf"\s*{_OPENED}", content)
    if begun is None or not prompt.rstrip().endswith(begun[1]):
        return content
    return content[begun.end() :].removeprefix(trailing(prompt))


def _within_thoughts(prompt: str, content: str) -> bool:
    """Whether `content` ends within thoughts, which it begins with, or which `prompt` opens."""
    opened = re.match(rf"\s*{_OPENED}", content) or re.search(rf"{_OPENED}\s*\Z", prompt)
    return opened is not None and f"{opened[1][0]}/{opened[1][1:]}" not in content


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
