"""Tools and calls of tools as templates read them: objects, where files hold JSON strings and Arrow's nulls."""

from __future__ import annotations

from typing import Any

import msgspec

from specd.data.faults import RowError, short

Tool = dict[str, Any]


def read_tools(value: Any, where: str) -> list[Tool] | None:
    """The tools of a row: a list of objects, of JSON strings, or one JSON string. None when there are none.

    Raises RowError for what is none of these.
    """
    return [_wrapped(item) for item in _objects(value, where, "`tools`", "tools that are no JSON")] or None


def read_calls(value: Any, where: str, number: int) -> list[Tool]:
    """The calls of turn `number`, as `read_tools`; arguments that are the JSON of an object become the object."""
    what = f"turn {number}'s `tool_calls`"
    return [_parsed_arguments(_wrapped(item)) for item in _objects(value, where, what, "tool calls that are no JSON")]


def _objects(value: Any, where: str, what: str, kind: str) -> list[dict[str, Any]]:
    """The objects in `value`, nulls left out: Arrow gives every struct the union of all keys. Those in a JSON string
    stay: Arrow did not write them."""
    if isinstance(value, str):
        parsed = [] if value.strip() in ("", "null") else _decoded(value)
    else:
        parsed = value or []
    items = [parsed] if isinstance(parsed, dict) else parsed
    if isinstance(items, list):
        items = [_decoded(item) if isinstance(item, str) else item for item in items if item is not None]
        if all(isinstance(item, dict) for item in items):
            return items if isinstance(value, str) else [without_nulls(item) for item in items]
    raise RowError(where, kind, f"{what} holds {short(value)}; expected a list of objects, or its JSON as a string")


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None


def _wrapped(item: dict[str, Any]) -> dict[str, Any]:
    """A function as OpenAI's API holds it: {"type": "function", "function": {…}}."""
    if "name" not in item or "function" in item or item.get("type", "function") != "function":
        return item
    outer: dict[str, Any] = {key: item[key] for key in ("id", "index") if key in item}
    inner = {key: value for key, value in item.items() if key not in ("type", *outer)}
    return {**outer, "type": "function", "function": inner}


def _parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict) and isinstance(text := function.get("arguments"), str):
        arguments = _decoded(text) if text.strip() else {}
        if isinstance(arguments, dict):
            return {**call, "function": {**function, "arguments": arguments}}
    return call


def without_nulls(value: Any) -> Any:
    """`value` without keys that are null, at any depth; nulls in lists stay, they are values there."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
