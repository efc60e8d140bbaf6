"""What is asked: the questions of a file, kept on disk until they are answered."""

from __future__ import annotations

import hashlib
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from specd.config.settings import DataConfig
from specd.data import forms
from specd.data.faults import Faults, RowError
from specd.data.forms import Turn
from specd.data.rows import read_rows, sources
from specd.errors import ConfigError

READ = frozenset(forms.COLUMNS) - {"form"} | {"rejected"}
"""Columns that a question is read from: what is written has `messages` in their place."""


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """One conversation to answer. where: its row, for messages. key: digest of what is asked.

    groups: the turns that lead up to each answer. tools, options: what the template gets beside them. kept: the row's
    other columns, which stay as they are.
    """

    where: str
    key: str
    groups: list[list[Turn]]
    tools: list[Any] | None = None
    options: dict[str, Any] = {}
    kept: dict[str, Any] = {}


class Questions:
    """The questions of a file by number, in its order. They lie in an unnamed file, so that memory stays flat.

    keys: of each. sizes: how long the first prompt of each is.
    """

    __slots__ = ("_file", "_starts", "keys", "sizes")

    def __init__(self, folder: Path) -> None:
        """folder: where the unnamed file lies."""
        self._file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
        self._starts = array("q", [0])
        self.keys: list[str] = []
        self.sizes = array("q")

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Question:
        self._file.seek(self._starts[number])
        line = self._file.read(self._starts[number + 1] - self._starts[number])
        return msgspec.json.decode(line, type=Question)

    def add(self, question: Question, size: int) -> None:
        """Raises ConfigError when the disk is full."""
        try:
            self._file.seek(self._starts[-1])
            self._starts.append(self._starts[-1] + self._file.write(msgspec.json.encode(question, enc_hook=str)))
        except OSError as error:
            raise ConfigError(f"cannot keep the questions beside --output: {error.strerror}; free some space") from None
        self.keys.append(question.key)
        self.sizes.append(size)

    def close(self) -> None:
        self._file.close()


def read_questions(config: DataConfig, size: Callable[[Question], int], into: Questions, faults: Faults) -> int:
    """Fill `into` with the questions of `config`'s rows; rows that cannot be answered go to `faults`.

    size: of a question, raises RowError for one that is too long. Equal questions get keys of their own, by their
    order. Returns the rows read. Raises ConfigError for unknown names in `data.columns`.
    """
    forms.check(config)
    seen: Counter[str] = Counter()
    columns = READ | set(config.columns.values())
    rows = 0
    for where, row in islice(chain.from_iterable(map(read_rows, sources(config))), config.max_samples or None):
        rows += 1
        try:
            question = _question(row, where, config, columns)
            length = size(question)
        except RowError as error:
            faults.add(error)
            continue
        seen[question.key] += 1
        if (times := seen[question.key]) > 1:
            question = msgspec.structs.replace(question, key=f"{question.key}-{times}")
        into.add(question, length)
    return rows


def _question(row: dict[str, Any] | RowError, where: str, config: DataConfig, columns: frozenset[str]) -> Question:
    if isinstance(row, RowError):
        raise row
    form = forms.read(row, where, config)
    if not isinstance(form, forms.Conversation):
        kind = "a text" if isinstance(form, forms.Text) else "token ids"
        detail = f"holds {kind}; expected a conversation or a prompt to answer, or data.format=conversations"
        raise RowError(where, "no question", detail)
    groups = forms.questions(form, where)
    asked = msgspec.json.encode([groups, form.tools, form.options], order="deterministic")
    key = hashlib.blake2b(asked, digest_size=16).hexdigest()
    kept = {name: value for name, value in row.items() if name not in columns}
    return Question(where=where, key=key, groups=groups, tools=form.tools, options=form.options, kept=kept)
