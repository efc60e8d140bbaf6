"""Turns as OpenAI, ShareGPT and trainers write them come to a template in one way."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chats import talk
from specd.data.faults import RowError
from specd.data.turns import Turns, read_turns


def read(*items: Any) -> Turns:
    return read_turns(list(items), "row 1", "messages")


def test_both_ways_of_writing_turns_and_their_json() -> None:
    told = talk("Hi", "Hello.")
    assert read(*told).turns == told
    names = ("human", "gpt")
    shared = [{"from": name, "value": turn["content"]} for name, turn in zip(names, told, strict=True)]
    assert read(*shared).turns == told
    assert read_turns(json.dumps(told), "row 1", "messages").turns == told
    # As Arrow gives a column that holds both.
    empty = dict.fromkeys(("role", "content", "from", "value"))
    assert read(empty | told[0], empty | shared[1]).turns == told


def test_a_template_sees_other_keys_and_no_nulls() -> None:
    turn = {"role": "tool", "content": "dry", "tool_call_id": "call00001", "name": None}
    assert read(turn).turns == [{"role": "tool", "content": "dry", "tool_call_id": "call00001"}]


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "H", "image_url": None}, {"type": "text", "text": "i"}]
    assert read({"role": "user", "content": parts}).turns == talk("Hi")


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_roles_of_calls(role: str) -> None:
    call = {"name": "rain", "arguments": {"town": "Ulm"}}
    wanted = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    values: list[Any] = [call, json.dumps(call), json.dumps([call])]
    for value in values:
        assert read({"from": role, "value": value}).turns == [wanted]
    assert read({"from": "observation", "value": "dry"}).turns == [{"role": "tool", "content": "dry"}]
    for none in ("It rains.", None, ""):
        with pytest.raises(RowError, match="turn 1"):
            read({"from": role, "value": none})


def test_calls_of_before_tools() -> None:
    turn = {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}}
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    assert read(turn).turns == [{"role": "assistant", "content": "", "tool_calls": [call]}]


def test_calls_that_are_none_are_no_key() -> None:
    """Templates ask whether the key is there."""
    nones: list[Any] = [None, [], "[]", ""]
    for none in nones:
        assert read({"role": "user", "content": "Hi", "tool_calls": none}).turns == talk("Hi")


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"loss": False}]
)
def test_answers_that_are_context(flag: dict[str, Any]) -> None:
    told = talk("Hi", "Hello.", "And?", "Fine.")
    told[1] |= flag
    told[3] |= {key: type(value)(1) for key, value in flag.items()}
    found = read(*told)
    assert found.turns == talk("Hi", "Hello.", "And?", "Fine.")
    assert found.context == {1}
    told[1] = talk("Hi", "Hello.")[1] | dict.fromkeys(flag)
    assert read(*told).context == frozenset()


@pytest.mark.parametrize("value", ["false", -1, [0]])
def test_an_unclear_flag_is_named(value: Any) -> None:
    with pytest.raises(RowError, match=r"row 1: turn 1 has weight .*; expected true or false, or a number from 0"):
        read({"role": "assistant", "content": "Hello.", "weight": value})


def test_answers_that_were_cut() -> None:
    told = talk("Hi", "Hello, and", "And?", "Fine.")
    told[1]["finish_reason"], told[3]["finish_reason"] = "length", "stop"
    found = read(*told)
    assert found.cut == {1}
    assert found.turns == talk("Hi", "Hello, and", "And?", "Fine.")


def test_an_answer_that_was_cut_in_its_thoughts_has_no_content() -> None:
    turn = {"role": "assistant", "content": None, "reasoning_content": "A greeting, so"}
    assert read(turn | {"finish_reason": "length"}).turns == [turn | {"content": ""}]
    with pytest.raises(RowError, match=r"turn 1 \(assistant\) has content None"):
        read(turn)


@pytest.mark.parametrize(
    ("items", "kind", "said"),
    [
        ([], "no turns", r"'messages' is \[\]; expected a list of at least one turn"),
        ("Hi", "no turns", "'messages' is 'Hi'"),
        ("{}", "no turns", "'messages' is '{}'"),
        (3, "no turns", "'messages' is 3"),
        (["Hi"], "no turns", "a turn in 'messages' is 'Hi'; expected an object"),
        ([None], "no turns", "a turn in 'messages' is None"),
        ([{"role": "robot", "content": "Hi"}], "unknown role", "turn 1 has role 'robot'; expected one of system, "),
        ([{"from": "bard", "value": "Hi"}], "unknown role", "turn 1 has from 'bard'"),
        ([{"content": "Hi"}], "unknown role", "turn 1 has role None"),
        ([{"role": ["user"], "content": "Hi"}], "unknown role", r"turn 1 has role \['user'\]"),
        ([{"role": "user", "content": 3}], "no content", r"turn 1 \(user\) has content 3; expected a string"),
        ([{"role": "user"}], "no content", "has content None"),
        ([{"from": "human", "text": "Hi"}], "no content", "has content None"),
        ([{"role": "user", "content": ["Hi"]}], "no content", r"has content \['Hi'\]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "no content", "has content"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "video", "video": "a.mp4"}]}],
            "content other than text",
            "turn 1 has content of type 'video'; expected text and images",
        ),
        ([*talk("Hi"), {"role": "assistant", "content": None}], "no content", r"turn 2 \(assistant\) has content None"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "no content", "has content None"),
    ],
)
def test_malformed_turns_are_named(items: Any, kind: str, said: str) -> None:
    with pytest.raises(RowError, match=f"^chats.jsonl line 7: {'.*'}{said}") as caught:
        read_turns(items, "chats.jsonl line 7", "messages")
    assert caught.value.kind == kind
