"""Conversations as a target sees them: turns, the tokenizer's chat template, and which characters are labels."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Turn = dict[str, Any]
"""`role`, `content` and whatever else the template reads (tool_calls, reasoning_content, …).

An answer's `finish_reason` is specd's own, hidden from templates: "length" if it was cut off.
"""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role names in use, and the role of the chat template each one means."""

Span = tuple[int, int]
"""Characters [start, end) of a text."""


class Rendered(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation as text. spans: the characters that the target writes, which may be labels."""

    text: str
    spans: tuple[Span, ...]


def turns(row: Mapping[str, Any], where: str) -> list[Turn]:
    """The conversation in `row`: OpenAI's `messages` or ShareGPT's `conversations`, as turns of known roles.

    Raises DataError naming `where` and the value for anything else.
    """
    column = "messages" if row.get("messages") is not None else "conversations"
    items = row.get(column)
    if not isinstance(items, list) or not items:
        raise DataError(f"{where}: {column!r} is {_short(items)}; expected a list of at least one turn")
    role_key, content_key = ("role", "content") if "role" in _mapping(items[0], where, column) else ("from", "value")
    result: list[Turn] = []
    for number, item in enumerate(items, start=1):
        turn = {key: value for key, value in _mapping(item, where, column).items() if value is not None}
        role, content = turn.pop(role_key, None), turn.pop(content_key, None)
        if not isinstance(role, str) or role not in ROLES:
            known = ", ".join(ROLES)
            raise DataError(f"{where}: turn {number} has {role_key} {_short(role)}; expected one of {known}")
        result.append({"role": ROLES[role], "content": _text(content, turn, f"{where}: turn {number}"), **turn})
    return result


def questions(conversation: list[Turn], where: str) -> list[list[Turn]]:
    """The turns that lead up to each answer of the assistant, without the answers: prompts to regenerate them.

    Raises DataError when the conversation asks nothing.
    """
    groups: list[list[Turn]] = [[]]
    for turn in conversation:
        if turn["role"] != "assistant":
            groups[-1].append(turn)
        elif groups[-1]:
            groups.append([])
    asked = [group for group in groups if group]
    if not asked or any(group[-1]["role"] == "system" for group in asked):
        raise DataError(f"{where}: no user turn to answer; expected a user or tool turn before each answer")
    return asked


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

        Raises DataError naming `where` when the template refuses it.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                _shown(conversation), tokenize=False, add_generation_prompt=open_answer, tools=tools, **self.options
            )
        except Exception as error:  # noqa: BLE001 - a template may raise anything: jinja's errors, TypeError, KeyError
            raise DataError(f"{where}: the chat template refuses it: {error}") from None
        assert isinstance(text, str), "tokenize=False gives one string for one conversation"
        return text

    def conversation(self, row: Mapping[str, Any], where: str, *, last_turn_only: bool = False) -> Rendered:
        """`row` as text, with the assistant's answers and their end-of-turn tokens as labels.

        An answer that was cut off (`finish_reason` "length") has no end-of-turn label: the target did not write it.
        A `finish_reason` of the row itself is that of the last answer. Raises DataError naming `where`.
        """
        talk = turns(row, where)
        if talk[-1]["role"] == "assistant":
            talk[-1].setdefault("finish_reason", row.get("finish_reason"))
        text = self.render(talk, tools=row.get("tools") or None, where=where)
        spans = self._marked(talk, row) if self._generation else list(self._answers(talk, text, row, where))
        for place, turn in enumerate(talk):
            if turn["role"] == "assistant" and turn.get("finish_reason") == "length":
                # A template that marks answers itself may mark several parts of one: the last was cut.
                until = talk[: place + 1]
                parts = self._marked(until, row) if self._generation else [t for t in until if t["role"] == "assistant"]
                if 0 < len(parts) <= len(spans):
                    begin, end = spans[len(parts) - 1]
                    spans[len(parts) - 1] = begin, begin + len(text[begin:end].removesuffix(self._closing))
        return Rendered(text=text, spans=tuple(spans[-1:] if last_turn_only else spans))

    def _answers(self, talk: list[Turn], text: str, row: Mapping[str, Any], where: str) -> Iterator[Span]:
        for place in (place for place, turn in enumerate(talk) if turn["role"] == "assistant"):
            asked = self.render(talk[:place], tools=row.get("tools") or None, where=where) if place else ""
            if not text.startswith(asked):
                raise DataError(
                    f"{where}: the chat template rewrites the turns before turn {place + 1} once it follows; "
                    f"cut the conversation after an earlier answer, or use preformatted `text` data"
                )
            at = len(asked) if place else max(text.find(self._header), 0)
            yield self._answer(text, at, talk[place]["content"])

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

    def _marked(self, talk: list[Turn], row: Mapping[str, Any]) -> list[Span]:
        """The spans that the template itself marks with {% generation %}."""
        coded: Any = self.tokenizer.apply_chat_template(
            _shown(talk),
            tools=row.get("tools") or None,
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
            spans = [(0, len(text))]
        return Rendered(text=text, spans=tuple(spans[-1:] if last_turn_only else spans))


class Encoder:
    """Texts to token ids and labels, many at once on all cores."""

    __slots__ = ("_core", "size", "tokenizer")

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """tokenizer: one with a `tokenizers` core, because labels are found by character offsets."""
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        # With trimmed offsets a whitespace token has no characters, and could not be told a label.
        core: Any = tokenizer.backend_tokenizer
        state = core.to_str().replace('"trim_offsets":true', '"trim_offsets":false')
        self._core = Tokenizer.from_str(state)
        self._core.no_truncation()
        self._core.no_padding()
        self.size = max(len(tokenizer), self._core.get_vocab_size())
        """Size of the vocabulary, added tokens included."""

    def encode(self, texts: Sequence[Rendered]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
        """(tokens int32, loss mask bool) of each text. A token is a label when it begins inside a span."""
        coded = self._core.encode_batch([rendered.text for rendered in texts], add_special_tokens=False)
        for rendered, encoding in zip(texts, coded, strict=True):
            begins = np.array([begin for begin, _ in encoding.offsets], np.int64)
            mask = np.zeros(begins.size, np.bool_)
            for start, end in rendered.spans:
                mask |= (begins >= start) & (begins < end)
            yield np.array(encoding.ids, np.int32), mask


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer whose files lie in `directory`. Raises DataError when it cannot be loaded or gives no offsets."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(
            f"no usable tokenizer in {str(directory)!r} ({first_line(error)}): conversations need the target's; "
            f"put its tokenizer.json there, or start the target with --tokenizer DIR"
        ) from None
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer in {str(directory)!r} gives no character offsets; convert it to a tokenizer.json"
        )
    return tokenizer


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a text: the tokenizer's, and those of the model's generation config.

    Raises DataError when there is none.
    """
    configured = model.generation_config.eos_token_id if model.generation_config else None
    found = [tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])]
    ends = list(dict.fromkeys(token for token in found if isinstance(token, int)))
    if not ends:
        raise DataError("the target's tokenizer names no end-of-sequence token; set eos_token in tokenizer_config.json")
    return ends


def _shown(conversation: list[Turn]) -> list[Turn]:
    """The turns as a template gets them: without `finish_reason`."""
    return [{key: value for key, value in turn.items() if key != "finish_reason"} for turn in conversation]


def _mapping(item: Any, where: str, column: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(f"{where}: a turn in {column!r} is {_short(item)}; expected an object with role and content")
    return item


def _text(content: Any, turn: Turn, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and turn.get("tool_calls"):
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise DataError(f"{where} has content {_short(content)}; expected a string")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
