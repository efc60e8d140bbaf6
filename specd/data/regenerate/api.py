"""What goes to a server that speaks OpenAI's chat API, and what comes back."""

from __future__ import annotations

import json
from email.utils import parsedate_to_datetime
from typing import Any

import msgspec

from specd.data.forms import Turn
from specd.data.regenerate.talk import FinishReason

MAX_WAIT_S = 600.0
"""Longest pause that a server may ask for."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One answer of a server. prompt_ids, ids: the tokens read and written, empty where the server does not say.

    fault: why it cannot be kept, else empty.
    """

    turn: Turn
    finish_reason: FinishReason
    num_tokens: int
    prompt_ids: list[int]
    ids: list[int]
    fault: str = ""


class Function(msgspec.Struct, kw_only=True):
    name: str
    arguments: Any = ""


class Call(msgspec.Struct, kw_only=True):
    function: Function
    id: str | None = None
    type: str = "function"


class Message(msgspec.Struct, kw_only=True):
    """vLLM calls thoughts `reasoning`, others `reasoning_content`."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Call] | None = None


class Choice(msgspec.Struct, kw_only=True):
    message: Message
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Usage(msgspec.Struct, kw_only=True):
    completion_tokens: int = 0


class Response(msgspec.Struct, kw_only=True):
    """vLLM has the prompt's tokens here, SGLang in the choice."""

    choices: list[Choice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class Garbled(Exception):
    """A server's answer that is none."""


def read_completion(body: bytes) -> Completion:
    """Raises Garbled for what is no finished completion."""
    try:
        response = msgspec.json.decode(body, type=Response)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Garbled(f"no completion but {body[:80]!r} ({error})") from None
    if not response.choices:
        raise Garbled("a completion without choices")
    choice = response.choices[0]
    if choice.finish_reason == "abort":
        raise Garbled("an answer that it aborted")
    said = choice.message
    turn: Turn = {"role": "assistant", "content": said.content or ""}
    if thought := said.reasoning_content or said.reasoning:
        turn["reasoning_content"] = thought
    if said.tool_calls:
        turn["tool_calls"] = msgspec.to_builtins(said.tool_calls)
    ids = choice.token_ids or []
    prompt = response.prompt_token_ids or choice.prompt_token_ids or []
    cut = choice.finish_reason == "length"
    fault = ""
    if choice.finish_reason == "content_filter":
        fault = "the server's content filter stopped the answer"
    elif cut and not said.content and (thought or said.tool_calls) and not (ids and prompt):
        # A template would write the end of the thoughts, which the target did not.
        fault = "the answer was cut within its thoughts or a tool call; give a higher --max-new-tokens"
    return Completion(
        turn=turn,
        finish_reason="length" if cut else "stop",
        num_tokens=response.usage.completion_tokens if response.usage else len(ids),
        prompt_ids=prompt if ids else [],
        ids=ids if prompt else [],
        fault=fault,
    )


def for_server(turns: list[Turn]) -> list[Turn]:
    """`turns` as the API has them: arguments of tool calls are JSON strings."""
    return [
        {**turn, "tool_calls": [_call(call) for call in turn["tool_calls"]]} if turn.get("tool_calls") else turn
        for turn in turns
    ]


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function.get("arguments") or {})}}


def reason(body: bytes) -> str:
    """What the body of a refusal says, in one line."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        found = body.decode(errors="replace")
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    text = " ".join((found if isinstance(found, str) else json.dumps(found)).split())
    return text if len(text) <= 200 else text[:199] + "…"


def retry_after(value: str | None, now: float) -> float:
    """Seconds to wait by a Retry-After header: a number or a date; 0 without one. now: Unix time."""
    if not value:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return 0.0
    return min(seconds, MAX_WAIT_S) if seconds > 0 else 0.0
