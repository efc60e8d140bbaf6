"""A tokenizer's chat template: turns to text, with its variables and its day fixed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from specd.data.faults import RowError
from specd.data.forms import Turn
from specd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters [start, end) of a text."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Template:
    """The chat template of one tokenizer, or its two: one for rows with tools.

    told_the_day: whether a rendering asked for the clock so far.
    """

    __slots__ = ("_now", "_sources", "_tokens", "told_the_day")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], date: str) -> None:
        """options: variables for the template. date: the day it is told if it asks, as 2026-01-31; empty for today.

        Raises DataError when there is no template.
        """
        self.told_the_day = False
        self._now = datetime.fromisoformat(f"{date}T12:00:00") if date else datetime.now()
        try:
            tools: list[Any] = [{}]
            found = [tokenizer.get_chat_template(None, None), tokenizer.get_chat_template(None, tools)]
        except ValueError:
            raise DataError(
                "the target's tokenizer has no chat template, which conversations need; use `text` or `input_ids` data"
            ) from None
        self._sources = {False: found[0], True: found[1]}
        self._tokens = {**tokenizer.special_tokens_map, "strftime_now": self._day, **options}

    def _day(self, form: str) -> str:
        self.told_the_day = True
        return self._now.strftime(form)

    def mentions(self, word: str) -> bool:
        return any(word in source for source in self._sources.values())

    def marks_answers(self, tools: Any) -> bool:
        """Whether the template says itself, with {% generation %}, what the assistant writes."""
        return _GENERATION.search(self._sources[bool(tools)]) is not None

    def render(self, turns: list[Turn], *, tools: Any = None, open_answer: bool = False, where: str = "") -> str:
        """The conversation as text; with `open_answer` up to where the target's answer begins.

        Raises RowError naming `where` when the template refuses it.
        """
        return self._render(turns, tools, where, add_generation_prompt=open_answer)[0]

    def marked(self, turns: list[Turn], *, tools: Any = None, where: str = "") -> tuple[str, list[Span]]:
        """The conversation as text, and the spans that the template marks with {% generation %}."""
        return self._render(turns, tools, where, return_assistant_tokens_mask=True)

    def _render(self, turns: list[Turn], tools: Any, where: str, **options: bool) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        source = self._sources[bool(tools)]
        try:
            texts, spans = render(
                conversations=[turns], tools=tools or None, chat_template=source, **options, **self._tokens
            )
        except Exception as error:  # noqa: BLE001 - a template may raise anything: jinja's errors, TypeError, KeyError
            raise RowError(where, "refused by the chat template", f"the chat template refuses it: {error}") from None
        return texts[0], spans[0] if spans else []
