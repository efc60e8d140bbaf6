"""A tokenizer's chat template: turns to text, with its variables and its day fixed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from specd.data.faults import RowError
from specd.data.forms import Turn
from specd.data.images import PLACE
from specd.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Characters [start, end) of a text."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Renderer:
    """The chat template as one row has it, with its tools and variables. where: the row, for messages."""

    __slots__ = ("_images", "_source", "_template", "_tools", "_variables", "where")

    def __init__(
        self,
        template: Template,
        source: str,
        variables: dict[str, Any],
        tools: list[Any] | None,
        where: str,
        images: bool,
    ) -> None:
        self._template, self._source, self._variables, self._tools = template, source, variables, tools
        self.where = where
        self._images = images

    @property
    def marks_answers(self) -> bool:
        """Whether the template says itself, with {% generation %}, what the assistant writes."""
        return _GENERATION.search(self._source) is not None

    def render(self, turns: list[Turn], *, open_answer: bool = False) -> str:
        """The conversation as text; with `open_answer` up to where the target's answer begins.

        Raises RowError when the template refuses it.
        """
        return self._render(turns, open_answer=open_answer)[0]

    def marked(self, turns: list[Turn]) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans that the template itself marks. Raises as `render`."""
        text, spans = self._render(turns, marked=True)
        return text, [span for span in spans if span[0] < span[1]]

    def _render(self, turns: list[Turn], *, open_answer: bool = False, marked: bool = False) -> tuple[str, list[Span]]:
        # Private, the same in transformers 5.8 to 5.24: render_jinja_template, which calls these two, gives templates
        # plain data alone since 5.23, and a text in place of the function that tells the day.
        from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

        with_spans: Any = _render_with_assistant_indices
        if self._template.parts:
            turns = [{**turn, "content": _parts(turn["content"], self._images)} for turn in turns]
        elif self._images:
            turns = [
                {**turn, "content": _parts(turn["content"], True)} if PLACE in turn["content"] else turn
                for turn in turns
            ]
        if self._template.json_arguments:
            turns = [_with_json(turn) if turn.get("tool_calls") else turn for turn in turns]
        given = {"messages": turns, "tools": self._tools, "documents": None, "add_generation_prompt": open_answer}
        try:
            compiled: Any = _compile_jinja_template(self._source)
            if not marked:
                return compiled.render(**given, **self._variables), []
            text, spans = with_spans(compiled, **given, **self._variables)
        except Exception as error:  # noqa: BLE001 - a template may raise anything: jinja's errors, TypeError, KeyError
            detail = f"the chat template refuses it: {first_line(error)}"
            raise RowError(self.where, "refused by the chat template", detail) from None
        return text, spans


class Template:
    """The chat template of one tokenizer, or its two: one for rows with tools.

    told_the_day: whether a rendering asked for the clock so far. parts: whether it gets contents as lists of parts,
    which is all that templates of some models of images read. json_arguments: whether it gets the arguments of calls as
    JSON, and not as objects.
    """

    __slots__ = ("_now", "_sources", "_variables", "json_arguments", "parts", "told_the_day")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], date: str) -> None:
        """options: variables for the template. date: the day it is told if it asks, as 2026-01-31; empty for today.

        Raises DataError when there is no template, ConfigError for a day that is none.
        """
        self.told_the_day = self.parts = self.json_arguments = False
        self._now = _noon(date) if date else datetime.now()
        named = tokenizer.chat_template
        if not named or (isinstance(named, dict) and "default" not in named):
            found = f"the chat templates {', '.join(named)}, and none named default" if named else "no chat template"
            raise DataError(
                f"the target's tokenizer has {found}, which conversations need; use `text` or `input_ids` data"
            )
        example: list[Any] = [{}]
        self._sources = {bool(tools): tokenizer.get_chat_template(None, tools) for tools in (None, example)}
        self._variables = {**tokenizer.special_tokens_map, "strftime_now": self._day, **options}

    def row(
        self,
        where: str,
        tools: list[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        images: bool = False,
    ) -> Renderer:
        """The template for a row with `tools` and `options` of its own, named `where`. images: it has some."""
        variables = {**self._variables, **options} if options else self._variables
        return Renderer(self, self._sources[bool(tools)], variables, tools or None, where, images)

    def mentions(self, word: str) -> bool:
        return any(word in source for source in self._sources.values())

    def _day(self, form: str) -> str:
        self.told_the_day = True
        return self._now.strftime(form)


def _parts(content: str, images: bool) -> list[dict[str, str]]:
    """A text as a list of parts, with an image for each place of one where there are `images`."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(content.split(PLACE) if images else [content]):
        if number:
            parts.append({"type": "image"})
        if text or not number:
            parts.append({"type": "text", "text": text})
    return parts if len(parts) == 1 or parts[0].get("text") != "" else parts[1:]


def _with_json(value: Any) -> Any:
    """A turn, a call or a function, with arguments as JSON."""
    if isinstance(value, list):
        return [_with_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    changed = {key: _with_json(value[key]) for key in ("tool_calls", "function") if key in value}
    if isinstance(value.get("arguments"), dict):
        changed["arguments"] = json.dumps(value["arguments"], ensure_ascii=False)
    return {**value, **changed}


def _noon(date: str) -> datetime:
    try:
        return datetime.fromisoformat(f"{date}T12:00:00")
    except ValueError:
        raise ConfigError(f"data.date={date}: expected a day that there is, as 2026-01-31") from None
