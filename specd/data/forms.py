"""What a row holds, whatever its columns are called: a conversation, a text, or token ids with their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.config.settings import DataConfig
from specd.data.faults import RowError

Turn = dict[str, Any]
"""What a chat template reads of a turn: `role`, `content` and whatever else (tool_calls, reasoning_content, …)."""

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


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """turns: of known roles, without specd's own keys. tools: what the template gets beside them, or None.

    cut: places of answers that ended at a length limit, so that the target did not write their end. context: places of
    answers that are no labels, as the row asks.
    """

    turns: list[Turn]
    tools: list[Any] | None = None
    cut: frozenset[int] = frozenset()
    context: frozenset[int] = frozenset()


class Text(msgspec.Struct, frozen=True, kw_only=True):
    """A text: one that already went through the chat template, or a plain document."""

    text: str


class Tokens(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids [N] int64 and their labels [N] bool, not yet held against a vocabulary."""

    ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]


Form = Conversation | Text | Tokens

_COLUMNS = {"tokens": ("input_ids",), "conversations": ("messages", "conversations"), "text": ("text",)}


def read(row: Mapping[str, Any], where: str, config: DataConfig) -> Form:
    """What `row` holds, by its columns or as `config.format` says. where: its place, for messages.

    Raises RowError for a row that cannot be used.
    """
    readers: dict[str, Callable[[Mapping[str, Any], str], Form]]
    readers = {"tokens": tokens, "conversations": conversation, "text": text}
    for kind, columns in _COLUMNS.items():
        if config.format in ("auto", kind) and any(row.get(column) is not None for column in columns):
            return readers[kind](row, where)
    wanted = "a conversation (`messages` or `conversations`), `text`, or `input_ids` with `loss_mask`"
    if config.format != "auto":
        wanted = f"data.format={config.format}, that is " + " or ".join(f"`{c}`" for c in _COLUMNS[config.format])
    raise RowError(where, "unknown columns", f"has the columns {sorted(row)}; expected {wanted}")


def conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """The conversation in `row`: OpenAI's `messages` or ShareGPT's `conversations`, as turns of known roles."""
    column = "messages" if row.get("messages") is not None else "conversations"
    items = row.get(column)
    if not isinstance(items, list) or not items:
        raise RowError(where, "no turns", f"{column!r} is {short(items)}; expected a list of at least one turn")
    role_key, content_key = ("role", "content") if "role" in _mapping(items[0], where, column) else ("from", "value")
    result: list[Turn] = []
    cut: set[int] = set()
    for number, item in enumerate(items, start=1):
        turn = {key: value for key, value in _mapping(item, where, column).items() if value is not None}
        role, content = turn.pop(role_key, None), turn.pop(content_key, None)
        if not isinstance(role, str) or role not in ROLES:
            known = ", ".join(ROLES)
            raise RowError(
                where, "unknown role", f"turn {number} has {role_key} {short(role)}; expected one of {known}"
            )
        if turn.pop("finish_reason", None) == "length":
            cut.add(number - 1)
        result.append({"role": ROLES[role], "content": _text(content, turn, where, number), **turn})
    if row.get("finish_reason") == "length":
        cut.add(len(result) - 1)
    return Conversation(turns=result, tools=row.get("tools") or None, cut=frozenset(cut))


def text(row: Mapping[str, Any], where: str) -> Text:
    found = row["text"]
    if not isinstance(found, str):
        raise RowError(where, "no text", f"`text` holds a {type(found).__name__}; expected a string")
    return Text(text=found)


def tokens(row: Mapping[str, Any], where: str) -> Tokens:
    arrays = []
    for column, top in (("input_ids", 2**31 - 1), ("loss_mask", 1)):
        try:
            array = np.array(row.get(column))
        except (ValueError, OverflowError):  # nested lists of unequal length, integers beyond 64 bits
            array = np.array(None)
        if (
            array.ndim != 1
            or array.dtype.kind not in "iub"
            or (array.size and not 0 <= array.min() <= array.max() <= top)
        ):
            found = "missing" if row.get(column) is None else f"{row[column]!r}"[:60]
            raise RowError(where, "no token ids", f"`{column}` is {found}; expected a list of integers from 0 to {top}")
        arrays.append(array)
    ids, mask = arrays
    if ids.size != mask.size:
        raise RowError(
            where,
            "no label for each token",
            f"{ids.size} `input_ids` but {mask.size} in `loss_mask`; expected one for each token",
        )
    return Tokens(ids=ids.astype(np.int64), loss_mask=mask.astype(np.bool_))


def questions(talk: Conversation, where: str) -> list[list[Turn]]:
    """The turns that lead up to each answer of the assistant, without the answers: prompts to regenerate them.

    Raises RowError when the conversation asks nothing.
    """
    groups: list[list[Turn]] = [[]]
    for turn in talk.turns:
        if turn["role"] != "assistant":
            groups[-1].append(turn)
        elif groups[-1]:
            groups.append([])
    asked = [group for group in groups if group]
    if not asked or any(group[-1]["role"] == "system" for group in asked):
        raise RowError(where, "no question", "no user turn to answer; expected a user or tool turn before each answer")
    return asked


def short(value: Any) -> str:
    """A value for a message."""
    found = repr(value)
    return found if len(found) <= 60 else found[:57] + "…"


def _mapping(item: Any, where: str, column: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise RowError(
            where, "no turns", f"a turn in {column!r} is {short(item)}; expected an object with role and content"
        )
    return item


def _text(content: Any, turn: Turn, where: str, number: int) -> str:
    if isinstance(content, str):
        return content
    if content is None and turn.get("tool_calls"):
        return ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise RowError(where, "no content", f"turn {number} has content {short(content)}; expected a string")
