"""What servers send is read, whichever of their dialects it is in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chat_server import said
from specd.data.regenerate.api import Garbled, for_server, read_completion, reason, retry_after

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}


def read(content: str | None, **options: Any) -> Any:
    more = options.pop("top", {})
    return read_completion(json.dumps(said(content, **options).body | more).encode())


def test_an_answer() -> None:
    found = read("Blue.", finish_reason="stop")
    assert found.turn == {"role": "assistant", "content": "Blue."}
    assert (found.finish_reason, found.num_tokens, found.ids, found.prompt_ids) == ("stop", 3, [], [])


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_and_tool_calls_are_kept(name: str) -> None:
    found = read(None, finish_reason="tool_calls", message={name: "Hm.", "tool_calls": [CALL], "refusal": None})
    assert found.turn == {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [CALL]}
    assert found.finish_reason == "stop"


def test_token_ids_of_vllm_and_of_sglang() -> None:
    vllm = read("x", token_ids=[4, 2], top={"prompt_token_ids": [1, 3]})
    sglang = read("x", token_ids=[4, 2], prompt_token_ids=[1, 3])
    assert vllm == sglang
    assert (vllm.prompt_ids, vllm.ids) == ([1, 3], [4, 2])
    assert read("x", token_ids=[4, 2]).ids == [], "without the prompt's they are of no use"


def test_an_answer_cut_in_its_thoughts_needs_token_ids() -> None:
    """A template would write an end of the thoughts that the target did not."""
    lost = read("", finish_reason="length", message={"reasoning_content": "Hm"})
    assert "cut within its thoughts" in lost.fault
    kept = read("", finish_reason="length", message={"reasoning_content": "Hm"}, token_ids=[4], prompt_token_ids=[1])
    assert (kept.finish_reason, kept.ids, kept.fault) == ("length", [4], "")
    well = read("Well, and", finish_reason="length")
    assert (well.finish_reason, well.fault) == ("length", "")
    assert "content filter" in read("", finish_reason="content_filter").fault


def test_what_is_no_answer() -> None:
    for body in (b"<html>", b"{}", b'{"choices": []}', b"\xff", b'{"choices": [{"message": {"content": 3}}]}'):
        with pytest.raises(Garbled):
            read_completion(body)
    with pytest.raises(Garbled, match="aborted"):
        read("x", finish_reason="abort")


def test_arguments_go_out_as_text() -> None:
    turns: list[dict[str, Any]]
    turns = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]
    (turn,) = for_server(turns)
    assert turn["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert turns[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}, "the turn itself stays"
    plain: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]
    assert for_server(plain) == plain


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"error": {"message": "too long"}}', "too long"),
        (b'{"object": "error", "message": "too\\nlong"}', "too long"),
        (b'{"detail": [{"loc": ["body"]}]}', '[{"loc": ["body"]}]'),
        (b"<h1>Bad</h1>", "<h1>Bad</h1>"),
        (b"x" * 300, "x" * 199 + "…"),
    ],
)
def test_the_reason_of_a_refusal_is_one_line(body: bytes, text: str) -> None:
    assert reason(body) == text


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0.0), ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("99999", 600.0), ("soon", 0.0), ("nan", 0.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0), ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
    ],
)  # fmt: skip
def test_how_long_a_server_asks_to_wait(value: str | None, seconds: float) -> None:
    assert retry_after(value, now=60.0) == seconds
