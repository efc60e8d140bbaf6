"""Tools and calls reach a template as objects, whatever the file holds."""

from __future__ import annotations

import json
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specd.data.faults import RowError
from specd.data.tools import read_calls, read_tools, without_nulls

TOOL = {
    "type": "function",
    "function": {"name": "rain", "parameters": {"type": "object", "properties": {"town": {"type": "string"}}}},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "rain", "arguments": {"town": "Ulm"}}}
STRINGY = {**CALL, "function": {"name": "rain", "arguments": json.dumps({"town": "Ulm"})}}


def calls(value: Any) -> list[Any]:
    return read_calls(value, "row 1", 2)


@pytest.mark.parametrize(
    "value", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], TOOL, json.dumps(TOOL), [None, TOOL]]
)
def test_tools_are_objects(value: Any) -> None:
    assert read_tools(value, "row 1") == [TOOL]


@pytest.mark.parametrize("value", [None, [], "", " ", "[]", "null", "{}"[:0]])
def test_no_tools(value: Any) -> None:
    assert read_tools(value, "row 1") is None
    assert calls(value) == []


def test_a_bare_function_is_wrapped_as_servers_hand_it_to_a_template() -> None:
    for bare in (TOOL["function"], {"type": "function", **TOOL["function"]}):  # type: ignore[dict-item]
        assert read_tools([bare], "row 1") == [TOOL]
    assert calls(json.dumps({"name": "rain", "arguments": {"town": "Ulm"}})) == [
        {"type": "function", "function": CALL["function"]}
    ]
    assert calls([{"id": "call00001", **CALL["function"]}]) == [CALL]  # type: ignore[dict-item]
    other = {"type": "web_search", "name": "web"}
    assert read_tools([other], "row 1") == [other]


@pytest.mark.parametrize(
    "value", [[CALL], [STRINGY], json.dumps([CALL]), json.dumps([STRINGY]), [json.dumps(STRINGY)], STRINGY]
)
def test_calls_and_their_arguments_are_objects(value: Any) -> None:
    assert calls(value) == [CALL]


@pytest.mark.parametrize("arguments", ["Ulm", '"Ulm"', "[1]", '{"town": ', "3"])
def test_arguments_that_are_no_object_stay_as_they_are(arguments: str) -> None:
    call = {"function": {"name": "rain", "arguments": arguments}}
    assert calls([call]) == [call]


def test_arguments_that_are_an_empty_string_are_none() -> None:
    assert calls([{"function": {"name": "now", "arguments": ""}}]) == [{"function": {"name": "now", "arguments": {}}}]


def test_nulls_of_arrow_are_left_out_at_any_depth() -> None:
    tools = [
        TOOL,
        {"type": "function", "function": {"name": "sine", "parameters": {
            "type": "object",
            "properties": {"angle": {"type": "number", "range": {"least": 0, "unit": [{"name": "rad", "of": "pi"}]}}},
            "required": ["angle"],
        }}},
        {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    ]  # fmt: skip
    arguments: list[dict[str, Any]] = [{"town": "Ulm"}, {"angle": 1.0, "deep": {"a": {"b": 1}}}, {}]
    made = [
        {"tools": [tool], "tool_calls": [{"function": {"name": tool["function"]["name"], "arguments": given}}]}  # type: ignore[index]
        for tool, given in zip(tools, arguments, strict=True)
    ]
    for row, before in zip(pyarrow.Table.from_pylist(made).to_pylist(), made, strict=True):
        assert "null" in json.dumps(row)
        assert read_tools(row["tools"], "row 1") == before["tools"]
        assert calls(row["tool_calls"]) == before["tool_calls"]


def objects(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    """Objects as one column of Arrow can hold them: a key's name says the type of its value."""
    leaves = {
        "s1": st.text(max_size=3),
        "s2": st.text(max_size=3),
        "n": st.integers(-9, 9),
        "l": st.lists(st.booleans()),
    }
    if depth:
        below = objects(depth - 1)
        leaves |= {"o1": below, "o2": below, "p": st.lists(below, max_size=2)}
    return st.fixed_dictionaries({}, optional=leaves)


@given(st.lists(objects(3), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_object_comes_back_from_arrow(made: list[dict[str, Any]]) -> None:
    stored = pyarrow.Table.from_pylist([{"arguments": item} for item in made]).to_pylist()
    assert [without_nulls(row["arguments"] or {}) for row in stored] == made


def test_nulls_that_arrow_did_not_write_stay() -> None:
    listed = [{"function": {"name": "f", "parameters": {"enum": [None, "a"]}}}]
    assert read_tools(listed, "row 1") == listed
    asked = {"function": {"name": "f", "arguments": {"unit": None}}}
    assert calls(json.dumps([asked])) == [asked]
    assert calls([{"function": {"name": "f", "arguments": '{"unit": null}'}}]) == [asked]


@pytest.mark.parametrize("value", ["rain", "3", 3, [3], ["rain"], '["rain"]', [[TOOL]], True])
def test_what_is_no_tool_is_named(value: Any) -> None:
    with pytest.raises(RowError, match=r"^row 1: `tools` holds .*; expected a list of objects, or its JSON") as caught:
        read_tools(value, "row 1")
    assert caught.value.kind == "tools that are no JSON"
    with pytest.raises(RowError, match=r"^row 1: turn 2's `tool_calls` holds"):
        calls(value)
