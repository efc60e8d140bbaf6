"""A server of OpenAI's chat API that answers as the test says, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import msgspec


class Said(msgspec.Struct, frozen=True):
    """One response. body: JSON, or bytes as they are. cut: the connection ends in the middle of it."""

    body: Any
    status: int = 200
    headers: dict[str, str] = {}
    cut: bool = False


def said(
    content: str | None, *, finish_reason: str = "stop", message: dict[str, Any] | None = None, **choice: Any
) -> Said:
    """A completion. message: more of its message. choice: more of its choice."""
    answer = {"role": "assistant", "content": content, **(message or {})}
    choices = [{"index": 0, "message": answer, "finish_reason": finish_reason, **choice}]
    return Said({"object": "chat.completion", "choices": choices, "usage": {"completion_tokens": 3}})


def failed(status: int, message: str = "no", **headers: str) -> Said:
    return Said(
        {"error": {"message": message}}, status, {name.replace("_", "-"): text for name, text in headers.items()}
    )


Script = Callable[[dict[str, Any]], Said]


class ChatServer:
    """Answers POST /v1/chat/completions by `script`, which gets the request and may block until `closing` is set.

    requests: all of them, without the probe for one token that each regeneration begins with; `probes` are those.
    """

    def __init__(self, script: Script, *, port: int = 0, probe: Script = lambda _: said("H")) -> None:
        self.requests: list[dict[str, Any]] = []
        self.probes: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.closing = threading.Event()
        self.models = ["tiny"]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.headers.append(dict(self.headers))
                if self.path != "/v1/chat/completions":
                    self.say(Said({"detail": "Not Found"}, 404))
                elif body.get("max_tokens") == 1:
                    outer.probes.append(body)
                    self.say(probe(body))
                else:
                    outer.requests.append(body)
                    self.say(script(body))

            def do_GET(self) -> None:
                self.say(Said({"object": "list", "data": [{"id": name} for name in outer.models]}))

            def say(self, answer: Said) -> None:
                data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                for name, text in answer.headers.items():
                    self.send_header(name, text)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if answer.cut else data)
                self.close_connection = self.close_connection or answer.cut

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 128

            def process_request(self, request: Any, client_address: Any) -> None:
                outer._open.append(request)
                super().process_request(request, client_address)

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the client hung up

        self._open: list[socket.socket] = []
        self._listener = Listener(("127.0.0.1", port), Handler)
        self.port = int(self._listener.server_address[1])
        self._thread = threading.Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The server is gone, as if it had been killed: its connections end as well."""
        if self.closing.is_set():
            return
        self.closing.set()
        self._listener.shutdown()
        for connection in self._open:
            with suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.server_close()
        self._thread.join()
