"""Answers by a server that speaks OpenAI's API: SGLang, vLLM, `transformers serve` and others."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Container, Generator, Iterable, Mapping
from http import HTTPStatus
from typing import Any

import httpx
import msgspec

from specd.data.faults import RowError
from specd.data.regenerate.api import Completion, Garbled, for_server, read_completion, reason, retry_after
from specd.data.regenerate.job import Sampling
from specd.data.regenerate.questions import Question, Questions
from specd.data.regenerate.talk import Reply, Talk
from specd.errors import ConfigError, DataError, TargetError

logger = logging.getLogger(__name__)

EXTRAS = {"return_token_ids": True, "skip_special_tokens": False}
"""Asked for where the server knows it, as SGLang and vLLM do: token ids, and texts with the special tokens in them."""
CONNECT_S = 20.0
MAX_BACKOFF_S = 60.0


class Refused(DataError):
    """The server does not answer one request for what is in it. kind: of the fault, in a few words."""

    def __init__(self, message: str, kind: str = "refused by the server") -> None:
        super().__init__(message)
        self.kind = kind


class Server:
    """Many conversations in flight at once, the longest first: what the server refuses as too long shows at once."""

    def __init__(
        self,
        endpoint: str,
        model: str,
        sampling: Sampling,
        *,
        template: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        key: str = "",
        concurrency: int = 64,
        retries: int = 6,
        timeout_s: float = 1800.0,
        backoff_s: float = 1.0,
    ) -> None:
        """endpoint: the API's base, as http://host:port/v1. model: as the server calls it. extra: fields of each
        request. key: the API key, if it wants one.

        retries: of a request that got no answer: a status of 429 or 5xx, a cut connection, no answer within timeout_s.
        backoff_s: pause before the first, which doubles; a Retry-After is honoured.
        Raises ConfigError for an endpoint that is no URL.
        """
        self._url, self._model = _base(endpoint), model
        self._concurrency, self._retries, self._timeout_s, self._backoff_s = concurrency, retries, timeout_s, backoff_s
        if not key.isascii() or not key.isprintable():
            raise ConfigError("the API key has characters that no header can hold; check OPENAI_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._fields: dict[str, Any] = {"model": model, "temperature": sampling.temperature}
        if sampling.max_new_tokens:
            self._fields["max_tokens"] = sampling.max_new_tokens
        if sampling.temperature:
            self._fields |= {"top_p": sampling.top_p, "seed": sampling.seed}
        if template:
            self._fields["chat_template_kwargs"] = dict(template)
        self._fields |= extra or {}
        self._optional = {name: value for name, value in EXTRAS.items() if name not in self._fields}
        self.settings: dict[str, Any] = {
            "target": model,
            "template": dict(template or {}),
            "extra": dict(extra or {}),
            **msgspec.to_builtins(sampling),
        }
        self._answered = 0
        self._in_trouble = False
        self._paused_until = 0.0

    def size(self, question: Question) -> int:
        """Characters: what a server's tokens are, it alone knows."""
        return sum(len(turn["content"]) for turn in question.groups[0]) + len(str(question.tools or ""))

    def answers(
        self, questions: Questions, kept: Container[int]
    ) -> Generator[tuple[int, Reply | RowError], None, None]:
        waiting = iter(sorted(range(len(questions)), key=lambda i: (-questions.sizes[i], i)))
        flying: dict[asyncio.Task[Reply], tuple[int, httpx.AsyncClient]] = {}
        idle = self._clients(min(self._concurrency, len(questions)))
        with asyncio.Runner() as runner:
            try:
                runner.run(self._probe(idle[0]))
                while True:
                    while idle and (number := next(waiting, None)) is not None:
                        if number not in kept:
                            client = idle.pop()
                            task = runner.get_loop().create_task(self._answer(client, questions[number]))
                            flying[task] = number, client
                    if not flying:
                        return
                    done = runner.run(_first(flying))
                    # A failure of the server itself ends all: first what came before it.
                    for task in sorted(done, key=_failed):
                        number, client = flying.pop(task)
                        idle.append(client)
                        try:
                            yield number, task.result()
                        except RowError as error:
                            yield number, error
            finally:
                runner.run(_close(flying, [*idle, *(client for _, client in flying.values())]))

    def _clients(self, count: int) -> list[httpx.AsyncClient]:
        """One a conversation in flight: the work of a client grows with the connections that it holds."""
        timeout = httpx.Timeout(self._timeout_s, connect=min(CONNECT_S, self._timeout_s))
        context = httpx.create_ssl_context()
        return [httpx.AsyncClient(headers=self._headers, timeout=timeout, verify=context) for _ in range(count)]

    async def _answer(self, client: httpx.AsyncClient, question: Question) -> Reply:
        """Answer all turns, as many as fit. Raises RowError when the first one gets no answer."""
        talk = Talk(question)
        while not talk.done:
            body: dict[str, Any] = {"messages": for_server(talk.ask()), **self._fields, **self._optional}
            if question.tools:
                body["tools"] = question.tools
            if question.options:
                body["chat_template_kwargs"] = self._fields.get("chat_template_kwargs", {}) | question.options
            try:
                found = await self._complete(client, body)
                if found.fault:
                    raise Refused(found.fault, "answer cut short")
            except Refused as error:
                if not talk.written:
                    raise RowError(question.where, error.kind, str(error)) from None
                logger.info("%s: ends after answer %d: %s", question.where, len(talk.written), error)
                break
            except DataError as error:
                raise RowError(question.where, "no answer from the server", str(error)) from None
            talk.answer(found.turn, found.finish_reason, found.num_tokens, found.prompt_ids, found.ids)
        return talk.reply(with_ids=True)

    async def _probe(self, client: httpx.AsyncClient) -> None:
        """Ask for one token, to learn what the server knows before rows depend on it.

        Raises ConfigError when it refuses the settings, TargetError when there is no server.
        """
        body = {"messages": [{"role": "user", "content": "Hi"}], **self._fields, "max_tokens": 1}
        try:
            try:
                await self._complete(client, body | self._optional, patient=False)
            except Refused:
                await self._complete(client, body, patient=False)
                logger.info("%s takes no %s: texts alone are kept", self._url, " or ".join(self._optional))
                self._optional = {}
        except Refused as error:
            raise ConfigError(
                f"{self._url} refuses a request with these settings: {error}; check --model, --extra and data.template"
            ) from None

    async def _complete(self, client: httpx.AsyncClient, body: dict[str, Any], *, patient: bool = True) -> Completion:
        """The server's answer to `body`, asked for again as often as it takes.

        Raises Refused for a request that it refuses, DataError when this one alone gets no answer, TargetError when
        none does, ConfigError for a wrong key or model. patient: retry what cannot be reached.
        """
        failures, begun = 0, self._answered
        before = begun
        while True:
            await asyncio.sleep(self._paused_until - time.monotonic())
            pause, unreachable, busy = 0.0, False, False
            try:
                response = await client.post(f"{self._url}/chat/completions", json=body)
                if response.status_code == HTTPStatus.OK:
                    found = read_completion(response.content)
                    self._well()
                    return found
                problem = f"answers {response.status_code}: {reason(response.content)}"
                if not _passing(response.status_code):
                    await self._refuse(client, response, problem)
                pause = retry_after(response.headers.get("retry-after"), time.time())
                busy = response.status_code in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                problem, unreachable = f"cannot be reached ({error or 'no connection in time'})", True
            except httpx.TimeoutException:
                problem = f"gave no answer within {self._timeout_s:g} s (--timeout)"
            except httpx.RequestError as error:
                problem = f"cut the connection ({error or type(error).__name__})"
            except Garbled as error:
                problem = f"sent {error}"
            # A busy server that answers others meanwhile will come to this one.
            failures = 1 if busy and self._answered > before else failures + 1
            before = self._answered
            if failures > self._retries or (unreachable and not patient):
                self._give_up(problem, failures, alone=self._answered > begun and not (unreachable or busy))
            pause = max(pause, min(self._backoff_s * 2 ** (failures - 1), MAX_BACKOFF_S))
            if busy:  # the others wait as well
                self._paused_until = max(self._paused_until, time.monotonic() + pause)
            self._ill(problem, pause)
            await asyncio.sleep(pause)

    def _well(self) -> None:
        self._answered += 1
        if self._in_trouble:
            logger.info("the server at %s answers again", self._url)
        self._in_trouble = False

    def _ill(self, problem: str, pause_s: float) -> None:
        """Say so once, not once a request."""
        if not self._in_trouble:
            logger.warning("the server at %s %s; trying again in %.1f s", self._url, problem, pause_s)
        self._in_trouble = True

    async def _refuse(self, client: httpx.AsyncClient, response: httpx.Response, problem: str) -> None:
        if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            given = "the key in" if self._headers else "an API key in"
            raise ConfigError(f"the server at {self._url} {problem}; it wants {given} OPENAI_API_KEY to be right")
        if response.status_code == HTTPStatus.NOT_FOUND:
            names = await self._models(client)
            known = (
                f"it has {', '.join(names)}" if names else "check that --endpoint ends as the server's API, as in /v1"
            )
            raise ConfigError(f"the server at {self._url} knows no model {self._model!r} ({problem}); {known}")
        raise Refused(f"the server {problem}")

    async def _models(self, client: httpx.AsyncClient) -> list[str]:
        try:
            listed = (await client.get(f"{self._url}/models")).json()["data"]
            return [str(model["id"]) for model in listed][:10]
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return []

    def _give_up(self, problem: str, failures: int, *, alone: bool) -> None:
        times = f"{failures} times in a row" if failures > 1 else "once"
        if alone:
            raise DataError(f"the server {problem}, {times}, and answers other rows")
        kept = "; answers so far are kept, the same command resumes" if self._answered else ""
        raise TargetError(f"the server at {self._url} {problem}, {times}; see that it runs and its log{kept}")


def _base(endpoint: str) -> str:
    """The API's base URL. Raises ConfigError."""
    try:
        url = httpx.URL(endpoint.strip())
    except httpx.InvalidURL as error:
        raise ConfigError(f"--endpoint {endpoint!r} is no URL ({error}); expected http://host:port/v1") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"--endpoint {endpoint!r}: expected http://host:port/v1")
    path = url.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return str(url.copy_with(path=path, query=None, fragment=None, userinfo=b""))


def _passing(status: int) -> bool:
    """Whether a status says that the same request may be answered later."""
    return status >= 500 or status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


async def _first(flying: Iterable[asyncio.Task[Reply]]) -> set[asyncio.Task[Reply]]:
    done, _ = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
    return done


def _failed(task: asyncio.Task[Reply]) -> bool:
    return task.exception() is not None and not isinstance(task.exception(), RowError)


async def _close(flying: Iterable[asyncio.Task[Reply]], clients: Iterable[httpx.AsyncClient]) -> None:
    for task in flying:
        task.cancel()
    await asyncio.gather(*flying, return_exceptions=True)
    for client in clients:
        await client.aclose()
