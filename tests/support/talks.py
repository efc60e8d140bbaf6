"""Conversations of the shapes that training data has, for every chat template to write."""

from __future__ import annotations

import json
from typing import Any

from families import Family

Talk = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]
"""Turns, and the tools beside them."""

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a town",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call_as_object(number: int, **arguments: Any) -> dict[str, Any]:
    return {
        "id": f"call{number:05d}",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }


def call_as_text(number: int, **arguments: Any) -> dict[str, Any]:
    """The arguments as OpenAI's API has them."""
    found = call_as_object(number, **arguments)
    return {**found, "function": {"name": "weather", "arguments": json.dumps(arguments)}}


def result(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "name": "weather", "tool_call_id": f"call{number:05d}", "content": content}


def talks(family: Family) -> dict[str, Talk]:
    """Conversations by name, with the thoughts of a turn under the key that the family's template reads."""
    call = call_as_text if family.strings else call_as_object
    colour, fruit, rain = user("Name a colour."), user("And a fruit?"), user("Rain in Ulm?")

    def thinking(content: str, thought: str, **more: Any) -> dict[str, Any]:
        return answer(content, **{family.thought: thought}, **more)

    look = family.opening or "[/INST]"
    plain: dict[str, list[dict[str, Any]]] = {
        "one": [colour, answer("Blue is one.")],
        "several": [colour, answer("Blue is one."), fruit, answer("Plum, for example."), rain, answer("No rain.")],
        "open": [colour, answer("Blue is one."), fruit],
        "system": [
            {"role": "system", "content": "Be brief: Blue."}, colour, answer("Blue."), fruit, answer("Plum."),
        ],
        "said before": [
            user("Is it Blue or Red? Say Blue."), answer("Blue"), user("Blue? Say yes."), answer("yes"),
            user("assistant"), answer("assistant"), user("yes"), answer("yes"),
        ],
        "one letter": [user("A"), answer("A"), user("n"), answer("n"), user("<"), answer("<")],
        "looks like the template": [
            user(f"Say {family.ends[0]}Blue."), answer(f"Blue{family.ends[0]} and {look}Blue."),
            user(f"{look}Plum"), answer(f"{look}Plum"),
        ],
        "empty": [colour, answer(""), fruit, answer("Plum."), rain, answer("")],
        "spaces": [colour, answer(" Blue. "), fruit, answer("\n\nPlum.\n"), rain, answer("\tNo\n\nrain.  ")],
        "other scripts": [user("色は？"), answer("青です。🙂"), user("é"), answer("e\u0301 — “ça”")],
        "assistant first": [answer("Hi there."), colour, answer("Blue.")],
        "two answers": [colour, answer("Blue."), answer("Or Red."), fruit, answer("Plum.")],
        "thoughts": [colour, thinking("Blue.", "They want one.")],
        "thoughts, several": [
            colour, thinking("Blue.", "They want one."), fruit, thinking("Plum.", "A fruit now."), rain,
            answer("No rain."),
        ],
        "thoughts in the content": [
            colour, answer("<think>\nOne of many.\n</think>\n\nBlue."), fruit,
            answer("<think>\nPlum comes to mind.\n</think>\n\nPlum."),
        ],
    }  # fmt: skip
    called: dict[str, list[dict[str, Any]]] = {
        "call": [
            rain, answer("", tool_calls=[call(1, town="Ulm")]), result(1, "dry"), answer("No rain."), fruit,
            answer("Plum."),
        ],
        "several calls": [
            {"role": "system", "content": "Use tools."}, rain,
            answer("", tool_calls=[call(1, town="Ulm"), call(2, town="Bonn", days=2)]), result(1, "dry"),
            result(2, "wet"), answer("No rain in Ulm."),
        ],
        "call and words": [
            rain, answer("Let me look.", tool_calls=[call(1, town="Ulm")]), result(1, "dry"), answer("dry"),
        ],
        "thoughts and calls": [
            rain, thinking("", "Look it up.", tool_calls=[call(1, town="Ulm")]), result(1, "dry"),
            thinking("No rain.", "It is dry."), user("And in Bonn?"), thinking("Ask again.", "Unsure."),
        ],
    }  # fmt: skip
    found: dict[str, Talk] = {name: (turns, None) for name, turns in plain.items()}
    return found | {name: (turns, TOOLS) for name, turns in called.items()}


def as_row(talk: Talk) -> dict[str, Any]:
    """The row of a data file that holds the conversation."""
    turns, tools = talk
    row: dict[str, Any] = {"messages": json.loads(json.dumps(turns))}
    return row | ({"tools": tools} if tools else {})
