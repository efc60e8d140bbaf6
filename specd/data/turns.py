"""Turns of a conversation, from the ways in which files write them to what a chat template reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from specd.data.faults import RowError, short
from specd.data.images import KINDS, PLACE, in_part
from specd.data.tools import read_calls

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
    "tool_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Role names in use, and the role of the chat template each one means."""

_CALLING = ("function_call", "tool_call")
"""Roles whose content is the JSON of a call, or of a list of calls."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_FLAGS = ("train", "training", "weight", "loss")
"""Keys by which files say that an answer is (true, 1) or is not (false, 0) learnt from."""


class Turns(msgspec.Struct, frozen=True, kw_only=True):
    """turns: of known roles, without the keys below. cut: places of answers that ended at a length limit.

    context: places of answers that are not learnt from. images: what the parts that are images name, in order, None for
    one that names nothing; `images.PLACE` stands for each in the texts.
    """

    turns: list[Turn]
    cut: frozenset[int]
    context: frozenset[int]
    images: tuple[Any, ...] = ()


def read_turns(items: Any, where: str, column: str) -> Turns:
    """The turns in `items`, a list or its JSON: OpenAI's role and content, or ShareGPT's from and value.

    Raises RowError when there is no turn, or one that has no known role or no text.
    """
    found = _decoded(items) if isinstance(items, str) else items
    if not isinstance(found, list) or not found:
        raise RowError(where, "no turns", f"{column!r} is {short(items)}; expected a list of at least one turn")
    turns: list[Turn] = []
    cut: set[int] = set()
    context: set[int] = set()
    images: list[Any] = []
    for place, item in enumerate(found):
        if not isinstance(item, dict):
            detail = f"a turn in {column!r} is {short(item)}; expected an object with role and content"
            raise RowError(where, "no turns", detail)
        turn, is_cut, is_context = _turn(item, where, place + 1, images)
        turns.append(turn)
        if is_cut:
            cut.add(place)
        if is_context:
            context.add(place)
    return Turns(turns=turns, cut=frozenset(cut), context=frozenset(context), images=tuple(images))


def _turn(item: Mapping[str, Any], where: str, number: int, images: list[Any]) -> tuple[Turn, bool, bool]:
    """Turn `number`, whether it was cut off, and whether it is context. Its images are added to `images`."""
    turn = {key: value for key, value in item.items() if value is not None}
    key = "role" if "role" in turn or "from" not in turn else "from"
    name = turn.pop(key, None)
    if not isinstance(name, str) or name not in ROLES:
        detail = f"turn {number} has {key} {short(name)}; expected one of {', '.join(ROLES)}"
        raise RowError(where, "unknown role", detail)
    content = turn.pop("content" if "content" in turn else "value", None)
    is_cut = turn.pop("finish_reason", None) == "length"
    is_context = _flagged(turn, where, number)
    if name in _CALLING:
        content, turn["tool_calls"] = None, content
    elif "tool_calls" not in turn and isinstance(turn.get("function_call"), dict):  # before OpenAI had tools
        turn["tool_calls"] = [turn.pop("function_call")]
    turn["tool_calls"] = read_calls(turn.get("tool_calls"), where, number)
    if not turn["tool_calls"]:
        del turn["tool_calls"]
    silent = "tool_calls" in turn or (is_cut and any(turn.get(key) for key in _THOUGHTS))
    if content is None and silent:
        content = ""
    role = ROLES[name]
    return {"role": role, "content": _text(content, where, number, role, images), **turn}, is_cut, is_context


def _flagged(turn: Turn, where: str, number: int) -> bool:
    """Whether a flag says that the turn is not learnt from. The flags are taken out of it."""
    is_context = False
    for key in _FLAGS:
        if key not in turn:
            continue
        value = turn.pop(key)
        if not isinstance(value, (bool, int, float)) or value < 0:
            detail = f"turn {number} has {key} {short(value)}; expected true or false, or a number from 0"
            raise RowError(where, "an unclear weight", detail)
        is_context |= not value
    return is_context


def _text(content: Any, where: str, number: int, role: str, images: list[Any]) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        kinds = [part.get("type") or "text" for part in content]
        allowed = ("text",) if role == "assistant" else ("text", *KINDS)
        if (other := next((kind for kind in kinds if kind not in allowed), None)) is not None:
            expected = "text alone in an answer" if role == "assistant" else "text and images, no sound or video"
            detail = f"turn {number} has content of type {short(other)}; expected {expected}"
            raise RowError(where, "content other than text", detail)
        texts = [PLACE if kind in KINDS else part.get("text") for kind, part in zip(kinds, content, strict=True)]
        if all(isinstance(text, str) for text in texts):
            images += [in_part(part) for kind, part in zip(kinds, content, strict=True) if kind in KINDS]
            return "".join(texts)
    raise RowError(where, "no content", f"turn {number} ({role}) has content {short(content)}; expected a string")


def listed(value: Any) -> Any:
    """The turns whose JSON `value` is, else `value` itself: a prompt or an answer may be either."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        found = _decoded(value)
        if isinstance(found, list) and all(
            isinstance(item, dict) and str(item.get("role") or item.get("from")) in ROLES for item in found
        ):
            return found
    return value


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None
