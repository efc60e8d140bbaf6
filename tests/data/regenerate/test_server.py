"""Answers of a server: many in flight, in order, whatever it does meanwhile."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chat_server import ChatServer, Said, failed, said
from chats import talk, write_rows
from specd.config.settings import DataConfig
from specd.data.regenerate.job import Progress, Sampling, regenerate
from specd.data.regenerate.server import Server
from specd.errors import ConfigError, DataError, TargetError

ROWS: list[dict[str, Any]] = [{"messages": talk(f"Q{i}?", "old"), "form": f"f{i}"} for i in range(9)]


def echo(request: dict[str, Any]) -> Said:
    return said(f"to {request['messages'][-1]['content']}")


def asked(request: dict[str, Any]) -> str:
    return str(request["messages"][-1]["content"])


def run(
    tmp_path: Path,
    url: str,
    *rows: dict[str, Any],
    sampling: Sampling | None = None,
    skip: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    config = DataConfig(path=write_rows(tmp_path / "in.jsonl", *rows), bad_rows="skip" if skip else "stop")
    server = Server(url, "tiny", sampling or Sampling(), **{"backoff_s": 0.01, "retries": 2} | options)
    regenerate(config, server, tmp_path / "out.jsonl")
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def contents(rows: list[dict[str, Any]]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


ANSWERS = [f"to Q{i}?" for i in range(9)]


def test_rows_keep_their_order_whichever_answer_comes_first(tmp_path: Path) -> None:
    """No answer is given before four requests are there, and the last one of those comes first."""
    gate, lock, order = threading.Barrier(4), threading.Lock(), []

    def script(request: dict[str, Any]) -> Said:
        if asked(request) in ("Q0?", "Q1?", "Q2?", "Q3?"):
            gate.wait(20)
        with lock:
            order.append(asked(request))
        return echo(request)

    with ChatServer(script) as server:
        rows = run(tmp_path, server.url, *ROWS[:4], concurrency=4)
        assert contents(rows) == ANSWERS[:4]
        assert rows[2] == {"messages": [*talk("Q2?"), {"role": "assistant", "content": "to Q2?", "finish_reason": "stop"}], "form": "f2"}  # fmt: skip  # noqa: E501
    assert len(order) == 4


def test_no_more_requests_are_in_flight_than_asked_for(tmp_path: Path) -> None:
    lock, flying, most = threading.Lock(), 0, 0

    def script(request: dict[str, Any]) -> Said:
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        answer = echo(request)
        with lock:
            flying -= 1
        return answer

    with ChatServer(script) as server:
        run(tmp_path, server.url, *ROWS, concurrency=3)
    assert 1 <= most <= 3


def test_settings_are_passed_on(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    with ChatServer(echo) as server:
        run(
            tmp_path,
            server.url,
            {"messages": talk("Hi"), "tools": tools},
            sampling=Sampling(max_new_tokens=40, temperature=0.7, top_p=0.9, seed=5),
            template={"enable_thinking": False},
            extra={"top_k": 20},
            key="sesame",
        )
        (request,) = server.requests
        assert {key: value for key, value in request.items() if key != "messages"} == {
            "model": "tiny", "temperature": 0.7, "top_p": 0.9, "seed": 5, "max_tokens": 40, "top_k": 20,
            "chat_template_kwargs": {"enable_thinking": False}, "tools": tools, "return_token_ids": True,
            "skip_special_tokens": False,
        }  # fmt: skip
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer sesame"}


def test_greedy_and_as_long_as_the_target_can_by_default(tmp_path: Path) -> None:
    with ChatServer(echo) as server:
        run(tmp_path, server.url, ROWS[0])
        assert server.requests[0]["temperature"] == 0
        assert not {"max_tokens", "top_p", "seed", "tools", "chat_template_kwargs"} & server.requests[0].keys()
        assert not any("Authorization" in headers for headers in server.headers)


def test_fields_that_a_server_does_not_know_are_left_out(tmp_path: Path) -> None:
    def probe(request: dict[str, Any]) -> Said:
        return failed(422, "Unexpected fields") if "return_token_ids" in request else said("H")

    with ChatServer(echo, probe=probe) as server:
        assert contents(run(tmp_path, server.url, *ROWS[:2])) == ANSWERS[:2]
        assert not any("return_token_ids" in request for request in server.requests)


def test_turns_are_answered_one_by_one_with_all_that_the_server_said(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def script(request: dict[str, Any]) -> Said:
        if asked(request) == "A?":
            return said(None, finish_reason="tool_calls", message={"reasoning": "Hm.", "tool_calls": [call]})
        return said("Done.", finish_reason="length")

    messages = [*talk("A?", "old"), {"role": "tool", "content": "7", "tool_call_id": "old"}]
    with ChatServer(script) as server:
        (row,) = run(tmp_path, server.url, {"messages": messages})
        result = {"role": "tool", "content": "7", "tool_call_id": "c1"}
        said_first = {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call]}
        assert row["messages"] == [
            messages[0], said_first | {"finish_reason": "stop"}, result,
            {"role": "assistant", "content": "Done.", "finish_reason": "length"},
        ]  # fmt: skip
        assert server.requests[1]["messages"] == [messages[0], said_first, result]


def test_token_ids_are_kept_as_one_sequence(tmp_path: Path) -> None:
    prompts = {"A?": [1, 10, 2], "B?": [1, 10, 2, 50, 51, 9, 11, 2], "C?": [1, 3]}
    ids = {"A?": [50, 51, 9], "B?": [60, 9], "C?": [70, 9]}

    def script(request: dict[str, Any]) -> Said:
        return said("x", token_ids=ids[asked(request)], prompt_token_ids=prompts[asked(request)])

    with ChatServer(script) as server:
        first, rewritten = run(
            tmp_path, server.url, {"messages": talk("A?", "", "B?")}, {"messages": talk("A?", "", "C?")}
        )
    assert first["input_ids"] == [1, 10, 2, 50, 51, 9, 11, 2, 60, 9]
    assert first["loss_mask"] == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1]
    assert "input_ids" not in rewritten, "its second prompt does not go on where the first answer ended"


def test_a_server_in_trouble_is_asked_again(tmp_path: Path) -> None:
    """Each request fails once, each in another way."""
    failures = [failed(429), failed(500), failed(503), Said(b"<html>"), Said({"choices": []}), said("x" * 99)]
    failures[-1] = Said(failures[-1].body, cut=True)
    first: dict[str, Said] = {f"Q{i}?": failure for i, failure in enumerate(failures)}

    with ChatServer(lambda request: first.pop(asked(request), None) or echo(request)) as server:
        assert contents(run(tmp_path, server.url, *ROWS[:6])) == ANSWERS[:6]
        assert len(server.requests) == 12


def test_a_wait_that_the_server_asks_for_is_kept_by_all(tmp_path: Path) -> None:
    times: list[float] = []

    def script(request: dict[str, Any]) -> Said:
        times.append(time.monotonic())
        return failed(429, retry_after="0.4") if len(times) == 1 else echo(request)

    with ChatServer(script) as server:
        assert contents(run(tmp_path, server.url, *ROWS[:3], concurrency=1)) == ANSWERS[:3]
    assert times[1] - times[0] >= 0.4


def test_a_busy_server_is_asked_until_it_has_come_to_all(tmp_path: Path) -> None:
    """It turns the last row away more often than a request may fail, but answers others meanwhile."""
    turned_away = Counter[str]()

    def script(request: dict[str, Any]) -> Said:
        name = asked(request)
        if turned_away[name] == ROWS.index({"messages": talk(name, "old"), "form": f"f{name[1]}"}):
            return echo(request)
        turned_away[name] += 1
        return failed(429)

    with ChatServer(script) as server:
        assert contents(run(tmp_path, server.url, *ROWS, retries=5, concurrency=9)) == ANSWERS
    assert turned_away["Q8?"] == 8


def test_a_server_that_is_busy_for_good_is_given_up(tmp_path: Path) -> None:
    with ChatServer(lambda _: failed(429, "later")) as server:
        with pytest.raises(TargetError, match=r"answers 429: later, 3 times in a row"):
            run(tmp_path, server.url, ROWS[0])
        assert len(server.requests) == 3


def test_a_row_that_the_server_refuses_stops_it_or_is_left_out(tmp_path: Path) -> None:
    def script(request: dict[str, Any]) -> Said:
        return failed(400, "maximum context length is 8") if "long" in asked(request) else echo(request)

    rows = [ROWS[0], {"messages": talk("a long one")}, ROWS[1]]
    with ChatServer(script) as server:
        with pytest.raises(
            DataError, match=r"1 of 3 rows .*\n.*line 2: the server answers 400: maximum context length"
        ):
            run(tmp_path, server.url, *rows, concurrency=1)
        assert [asked(request) for request in server.requests] == ["a long one"], "the longest is asked first"
        assert contents(run(tmp_path, server.url, *rows, skip=True)) == ANSWERS[:2]


def test_a_conversation_ends_before_the_turn_that_the_server_refuses(tmp_path: Path) -> None:
    def script(request: dict[str, Any]) -> Said:
        return failed(400, "too long") if len(request["messages"]) > 4 else echo(request)

    with ChatServer(script) as server:
        (row,) = run(tmp_path, server.url, {"messages": talk("A?", "", "B?", "", "C?")})
    assert [turn["content"] for turn in row["messages"]] == ["A?", "to A?", "B?", "to B?"]


def test_a_target_that_thinks_is_asked_all_the_same(tmp_path: Path) -> None:
    """One token of it is a thought, and a thought that is cut off cannot be kept."""

    def think(request: dict[str, Any]) -> Said:
        return said(None, finish_reason="length", message={"reasoning_content": "Hm"})

    with ChatServer(
        lambda request: think(request) if asked(request) == "Q1?" else echo(request), probe=think
    ) as server:
        assert contents(run(tmp_path, server.url, *ROWS[:2], skip=True)) == ANSWERS[:1]
        (tmp_path / "out.jsonl").unlink()
        with pytest.raises(DataError, match=r"1 × answer cut short, .*line 2: the answer was cut within its thoughts"):
            run(tmp_path, server.url, *ROWS[:2])


def test_a_row_that_alone_gets_no_answer_is_left_out(tmp_path: Path) -> None:
    """It waits for the others, so that the server is known to be well."""
    others = threading.Semaphore(0)

    def script(request: dict[str, Any]) -> Said:
        if asked(request) == "Q1?":
            others.acquire(timeout=20)
            return failed(500, "CUDA error")
        others.release()
        return echo(request)

    with ChatServer(script) as server:
        rows = run(tmp_path, server.url, *ROWS[:6], skip=True)
    assert contents(rows) == [answer for answer in ANSWERS[:6] if answer != "to Q1?"]


def test_a_server_that_hangs_is_given_up(tmp_path: Path) -> None:
    def script(request: dict[str, Any]) -> Said:
        server.closing.wait(20)
        return echo(request)

    with (
        ChatServer(script) as server,
        pytest.raises(TargetError, match=r"gave no answer within 0.2 s \(--timeout\), 2 times in a row"),
    ):
        run(tmp_path, server.url, ROWS[0], timeout_s=0.2, retries=1)


def test_a_server_that_dies_loses_nothing_and_the_same_command_resumes(tmp_path: Path) -> None:
    config = DataConfig(path=write_rows(tmp_path / "in.jsonl", *ROWS))
    out = tmp_path / "out.jsonl"
    seen: list[int] = []

    def progress(now: Progress) -> None:
        seen.append(now.samples)
        if now.samples == 4:
            dying.__exit__(None, None, None)

    with ChatServer(echo) as dying:
        port = dying.port
        answerer = Server(dying.url, "tiny", Sampling(), concurrency=2, retries=1, backoff_s=0.01)
        with pytest.raises(TargetError, match=r"cannot be reached .* 2 times in a row.*the same command resumes"):
            regenerate(config, answerer, out, on_answer=progress)
    with pytest.raises(TargetError, match=r"cannot be reached .*, once"):
        run(tmp_path, f"http://127.0.0.1:{port}", *ROWS)
    with ChatServer(echo) as again:  # elsewhere
        assert contents(run(tmp_path, again.url, *ROWS)) == ANSWERS
        assert len(again.requests) == 9 - seen[-1]


def test_a_server_that_comes_back_in_time_is_waited_for(tmp_path: Path) -> None:
    """It is gone when the first answer is there, and listens again once a request found nobody."""
    config = DataConfig(path=write_rows(tmp_path / "in.jsonl", *ROWS))
    comeback: list[ChatServer] = []

    class Unreachable(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "cannot be reached" in record.getMessage() and not comeback:
                comeback.append(servers.enter_context(ChatServer(echo, port=first.port)))

    def progress(now: Progress) -> None:
        if now.samples == 1:
            first.__exit__(None, None, None)

    logger = logging.getLogger("specd.data.regenerate.server")
    handler, level = Unreachable(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with ExitStack() as servers:
            first = servers.enter_context(ChatServer(echo))
            answerer = Server(first.url, "tiny", Sampling(), concurrency=1, retries=3, backoff_s=0.01)
            done = regenerate(config, answerer, tmp_path / "out.jsonl", on_answer=progress)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert done.samples == 9
    assert len(comeback[0].requests) == 8


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (failed(401, "who are you"), r"answers 401: who are you; it wants an API key in OPENAI_API_KEY"),
        (failed(404, "no such model"), r"knows no model 'tiny' .*; it has tiny"),
        (
            failed(400, "bad temperature"),
            r"refuses a request with these settings: the server answers 400: bad temperature",
        ),
    ],
)
def test_what_no_row_can_help_is_said_before_the_first(tmp_path: Path, answer: Said, message: str) -> None:
    with ChatServer(echo, probe=lambda _: answer) as server:
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, server.url, *ROWS)
        assert server.requests == []
    assert [file.name for file in tmp_path.iterdir()] == ["in.jsonl"]


def test_nobody_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(TargetError, match=r"the server at http://127.0.0.1:\d+/v1 cannot be reached"):
            run(tmp_path, f"http://127.0.0.1:{free.getsockname()[1]}", *ROWS)


def test_the_api_key_is_never_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with ChatServer(echo, probe=lambda _: failed(401, "no")) as server, pytest.raises(ConfigError) as caught:
        run(tmp_path, server.url.replace("//", "//me:sesame@"), *ROWS, key="sesame")
    assert "sesame" not in caplog.text + str(caught.value)
    with pytest.raises(ConfigError, match="check OPENAI_API_KEY") as caught:
        Server("http://h/v1", "tiny", Sampling(), key="sesamé")
    assert "sesam" not in str(caught.value)


@pytest.mark.parametrize("endpoint", ["localhost:30000", "tcp://h:1", "http://", "http://h:port/v1", ""])
def test_what_is_no_endpoint(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="http://host:port/v1"):
        Server(endpoint, "tiny", Sampling())


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_endpoint_may_be_given_in_many_ways(tmp_path: Path, ending: str) -> None:
    with ChatServer(echo) as server:
        assert len(run(tmp_path, server.url.removesuffix("/v1") + ending, ROWS[0])) == 1
