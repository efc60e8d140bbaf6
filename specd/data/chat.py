"""Conversations as a target sees them: turns, the tokenizer's chat template, and which characters are labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import msgspec

from specd.data.faults import RowError
from specd.data.forms import Conversation, Turn
from specd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters [start, end) of a text."""


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation or a document as text. spans: the characters that the target writes, which may be labels.

    document: the text never went through a template, so the tokenizer adds its own BOS.
    """

    text: str
    spans: tuple[Span, ...]
    document: bool = False


class Chat:
    """The chat template of one tokenizer, and the constant text it writes around an answer."""

    __slots__ = ("_closing", "_generation", "_header", "_leads", "options", "tokenizer")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None) -> None:
        """options: variables for the template, as enable_thinking of Qwen3. Raises DataError for unusable templates."""
        self.tokenizer = tokenizer
        self.options = dict(options or {})
        template = tokenizer.chat_template
        if not template:
            raise DataError("the target's tokenizer has no chat template; use preformatted `text` or `input_ids` data")
        self._generation = isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        self._probe()

    def _probe(self) -> None:
        """Learn from short renderings how an answer begins and ends, as the last turn and before others."""
        question, mark = {"role": "user", "content": "Q"}, "specdprobe"
        answer = {"role": "assistant", "content": mark}
        asked, opened = self.render([question]), self.render([question], open_answer=True)
        last, _, after = self.render([question, answer]).partition(mark)
        early, found, _ = self.render([question, answer, question]).partition(mark)
        if not found or not after or not all(text.startswith(asked) for text in (opened, last, early)):
            raise DataError(
                "the chat template does not write an assistant's content after the turns before it; "
                "use preformatted `text` or `input_ids` data"
            )
        # Some templates write an empty think block before the last answer, and not before earlier ones.
        self._leads = tuple(sorted({last[len(asked) :], early[len(asked) :]}, key=len, reverse=True))
        """Texts the template may write between the turn before and an answer's content."""
        self._header = commonprefix([opened[len(asked) :], *self._leads])  # noqa: RUF071 - of texts, not of paths
        """The text that begins every answer."""
        specials = sorted(map(str, self.tokenizer.all_special_tokens), key=len, reverse=True)
        bare = after.lstrip()
        ending = next((token for token in specials if token and bare.startswith(token)), "")
        self._closing = after[: len(after) - len(bare)] + ending if ending else ""
        """The end-of-turn token with any whitespace before it; empty if the template has none."""

    def render(
        self, conversation: list[Turn], *, open_answer: bool = False, tools: Any = None, where: str = "a conversation"
    ) -> str:
        """The conversation as text; with `open_answer` up to where the target's answer begins.

        Raises RowError naming `where` when the template refuses it.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=open_answer, tools=tools, **self.options
            )
        except Exception as error:  # noqa: BLE001 - a template may raise anything: jinja's errors, TypeError, KeyError
            raise RowError(where, "refused by the chat template", f"the chat template refuses it: {error}") from None
        assert isinstance(text, str), "tokenize=False gives one string for one conversation"
        return text

    def conversation(self, talk: Conversation, where: str, *, last_turn_only: bool = False) -> Rendered:
        """`talk` as text, with the assistant's answers and their end-of-turn tokens as labels.

        An answer that was cut off has no end-of-turn label: the target did not write it.
        Raises RowError naming `where`.
        """
        text = self.render(talk.turns, tools=talk.tools, where=where)
        spans = self._marked(talk, talk.turns) if self._generation else list(self._answers(talk, text, where))
        for place in sorted(talk.cut):
            # A template that marks answers itself may mark several parts of one: the last was cut.
            until = talk.turns[: place + 1]
            parts = self._marked(talk, until) if self._generation else [t for t in until if t["role"] == "assistant"]
            if 0 < len(parts) <= len(spans):
                begin, end = spans[len(parts) - 1]
                spans[len(parts) - 1] = begin, begin + len(text[begin:end].removesuffix(self._closing))
        return Rendered(text=text, spans=tuple(spans[-1:] if last_turn_only else spans))

    def _answers(self, talk: Conversation, text: str, where: str) -> Iterator[Span]:
        for place in (place for place, turn in enumerate(talk.turns) if turn["role"] == "assistant"):
            asked = self.render(talk.turns[:place], tools=talk.tools, where=where) if place else ""
            if not text.startswith(asked):
                raise RowError(
                    where,
                    "turns rewritten",
                    f"the chat template rewrites the turns before turn {place + 1} once it follows; cut the "
                    f"conversation after an earlier answer, or use preformatted `text` data",
                )
            at = len(asked) if place else max(text.find(self._header), 0)
            yield self._answer(text, at, talk.turns[place]["content"])

    def _answer(self, text: str, at: int, content: str) -> Span:
        """The answer that the template begins at character `at`, its end-of-turn token included."""
        for form in (content, content.strip()):
            for lead in self._leads:
                if form and text.startswith(lead + form, at):
                    begin = at + len(lead)
                    return begin, self._end(text, begin + len(form))
        # The template takes the content apart (a think block) or adds to it (tool calls): all of it is the target's.
        begin = at + len(self._header)
        return begin, self._end(text, begin)

    def _end(self, text: str, at: int) -> int:
        """The end of the answer whose content reaches at least up to character `at`."""
        if not self._closing:
            return at
        closing = text.find(self._closing, at)
        return len(text) if closing < 0 else closing + len(self._closing)

    def _marked(self, talk: Conversation, turns: list[Turn]) -> list[Span]:
        """The spans that the template itself marks with {% generation %}."""
        coded: Any = self.tokenizer.apply_chat_template(
            turns,
            tools=talk.tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            **self.options,
        )
        spans: list[Span] = []
        for label, (start, end) in zip(coded["assistant_masks"], coded["offset_mapping"], strict=True):
            if label and spans and start <= spans[-1][1]:
                spans[-1] = (spans[-1][0], end)
            elif label:
                spans.append((start, end))
        return spans

    def preformatted(self, text: str, *, last_turn_only: bool = False) -> Rendered:
        """A text that already went through the template: answers are found by their header and end-of-turn token.

        A text without any special token is a plain document, and all of it is a label.
        """
        spans: list[Span] = []
        at = text.find(self._header) if self._header else -1
        while at >= 0:
            lead = next((lead for lead in self._leads if text.startswith(lead, at)), self._header)
            begin = at + len(lead)
            end = self._end(text, begin) if self._closing else len(text)
            spans.append((begin, end))
            at = text.find(self._header, end)
        if not spans and not any(str(token) in text for token in self.tokenizer.all_special_tokens):
            return Rendered(text=text, spans=((0, len(text)),), document=True)
        return Rendered(text=text, spans=tuple(spans[-1:] if last_turn_only else spans))
