"""Prompts of an evaluation: what a data set's rows ask, as token ids up to where the target goes on."""

from __future__ import annotations

import contextlib
import logging
from itertools import chain
from typing import Any

import msgspec

from specd.config.settings import DataConfig
from specd.data import forms
from specd.data.chat import Chat, Rendered
from specd.data.faults import Fault, Faults, RowError
from specd.data.rows import read_rows, sources
from specd.data.tokenizer import Encoder
from specd.errors import DataError

logger = logging.getLogger(__name__)

DOCUMENT_TOKENS = 256
"""Of a document that has no prompt of its own, so many tokens are one."""


class Prompts(msgspec.Struct, frozen=True, kw_only=True):
    """ids: token ids of each prompt, at least one. bad: rows that cannot be used, by the kind of fault."""

    ids: tuple[tuple[int, ...], ...]
    bad: tuple[Fault, ...] = ()


def read_prompts(config: DataConfig, tokenizer: Any, *, size: int, limit: int = 0, longest: int = 0) -> Prompts:
    """The prompts of the first rows of `config.path` that have one: `limit` of them, 0 for all.

    Of a conversation it is the turns before the first answer; of a `prompt` alone a user's turn; of a text that went
    through the template, and of token ids, what stands before the first label; of a document its first DOCUMENT_TOKENS
    tokens. Where the tokenizer has no chat template, a prompt, or the one question of a conversation, as it stands.
    size: rows of the target's embedding. longest: tokens of a prompt, 0 for any number.
    Raises DataError for rows that cannot be used, unless `config.bad_rows` is skip, and when nothing is asked.
    """
    found: list[tuple[int, ...]] = []
    faults, rows = Faults(), 0
    asker = Asker(tokenizer, config)
    for where, row in chain.from_iterable(read_rows(source) for source in sources(config)):
        rows += 1
        try:
            if isinstance(row, RowError):
                raise row
            found.append(_checked(asker.ask(row, where), where, size, longest))
        except RowError as error:
            faults.add(error)
        if limit and len(found) + (len(faults) if config.bad_rows == "stop" else 0) >= limit:
            break
    names = ", ".join(map(str, sources(config)))
    if config.bad_rows == "stop":
        faults.stop(names, rows)
    for fault in faults.found():
        logger.warning("%s: %d rows left out: %s; the first: %s", names, fault.rows, fault.kind, fault.first)
    if asker.bare:
        logger.warning("%s: the target has no chat template: %d questions are asked as they stand", names, asker.bare)
    if not found:
        raise DataError(f"none of the {rows} rows of {names} asks anything; expected conversations or `prompt` rows")
    return Prompts(ids=tuple(found), bad=faults.found())


class Asker:
    """What rows ask of one target. bare: how many questions went without the chat template that the target lacks."""

    __slots__ = ("_chat", "_config", "_encoder", "bare")

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self._encoder = Encoder(tokenizer)
        self._chat = Chat(tokenizer, config.template, date=config.date) if tokenizer.chat_template else None
        self._config = config
        self.bare = 0

    def ask(self, row: dict[str, Any], where: str) -> list[int]:
        """The prompt in `row` as token ids. Raises RowError when there is none."""
        form = self._read(row, where)
        if isinstance(form, forms.Tokens):
            return self._opening(form.ids.tolist(), form.loss_mask.tolist())
        if isinstance(form, forms.Text):
            return self._text(form, where)
        asked = forms.questions(form, where)[0]
        if self._chat is not None:
            text = self._chat.render(asked, open_answer=True, tools=form.tools, options=form.options, where=where)
            return self._encode(text)
        if len(asked) > 1 or form.tools:
            detail = "a conversation, for which the target has no chat template; expected `prompt` or `text`"
            raise RowError(where, "no chat template", detail)
        self.bare += 1
        return self._encode(asked[0]["content"], document=True)

    def _read(self, row: dict[str, Any], where: str) -> forms.Form:
        """What `row` holds. A target without a chat template goes on with a prompt as it stands."""
        if self._chat is None and self._config.format == "auto":
            with contextlib.suppress(RowError):
                return forms.read(row, where, msgspec.structs.replace(self._config, format="text"))
        return forms.read(row, where, self._config)

    def _text(self, form: forms.Text, where: str) -> list[int]:
        if not form.text.strip():
            raise RowError(where, "no prompt", "its text is empty; expected a prompt")
        if form.prompt:
            return self._encode(form.text[: form.prompt], document=True)
        rendered = self._chat.preformatted(form.text) if self._chat else None
        if rendered is None or rendered.document:
            return self._encode(form.text, document=True)[:DOCUMENT_TOKENS]
        begin = rendered.spans[0][0] if rendered.spans else len(form.text)
        return self._encode(form.text[:begin])

    def _encode(self, text: str, *, document: bool = False) -> list[int]:
        """Token ids of `text`; without the end token that the tokenizer writes behind a document."""
        ((tokens, _),) = self._encoder.encode([Rendered(text=text, spans=(), document=document)])
        ids: list[int] = tokens.tolist()
        tokenizer = self._encoder.tokenizer
        if document and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
            ids.pop()
        return ids

    @staticmethod
    def _opening(ids: list[int], labels: list[bool]) -> list[int]:
        first = labels.index(True) if True in labels else len(ids)
        return ids[:first] if first else ids[:DOCUMENT_TOKENS]


def _checked(ids: list[int], where: str, size: int, longest: int) -> tuple[int, ...]:
    if not ids:
        raise RowError(where, "no prompt", "its prompt is empty; expected at least one token")
    if max(ids) >= size:
        detail = f"its prompt has token {max(ids)}; expected tokens from 0 to {size - 1}, as the target has"
        raise RowError(where, "token beyond the vocabulary", detail)
    if longest and len(ids) > longest:
        detail = f"its prompt has {len(ids)} tokens; expected at most {longest}, so that the answer fits the target"
        raise RowError(where, "too long a prompt", detail)
    return tuple(ids)
