"""A page of metrics for Prometheus over HTTP, which answers one peer at a time."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from specd.endpoints import is_loopback
from specd.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

logger = logging.getLogger(__name__)

Collect = Callable[[], "Iterable[Metric]"]
LOOPBACK = "127.0.0.1"
ADDRESS = re.compile(r"(?:(?P<host>\[[0-9A-Fa-f:.%]+\]|[^][:/\s]+):)?(?P<port>[0-9]{1,5})")
PEER_S = 2.0
"""A peer that says nothing for so long is hung up on: others wait for it."""


def parse(address: str) -> tuple[str, int]:
    """Host and port of `PORT` or `HOST:PORT`; the host is loopback where none is named. Raises ConfigError."""
    found = ADDRESS.fullmatch(address)
    if found is None or int(found["port"]) > 65535:
        raise ConfigError(
            f"metrics={address!r}: expected PORT, which this machine alone reaches, or ADDRESS:PORT, as 9464 or "
            f"192.0.2.7:9464; port 0 takes a free one"
        )
    return (found["host"] or LOOPBACK).strip("[]"), int(found["port"])


def listen(address: str) -> socket.socket:
    """A socket that listens at `address`, see `parse`. Raises ConfigError for one where that cannot be."""
    listener, host = _bound(address), parse(address)[0]
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}/metrics"
    if not is_loopback(host):
        logger.warning("metrics at %s are read by everybody who reaches it: they ask for no key", url)
    logger.info("metrics at %s", url)
    return listener


def check(address: str) -> None:
    """Raise ConfigError where `listen` would, as things are now."""
    _bound(address).close()


def _bound(address: str) -> socket.socket:
    host, port = parse(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        host.encode("idna")  # what cannot be a name
        return socket.create_server((host, port), family=family, backlog=16)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"metrics={address!r}: cannot listen there: {reason}; name another port, or 0 for a free one, and an "
            f"address of this machine"
        ) from None


def answer(listener: socket.socket, collect: Collect, pid: int | None = None) -> WSGIServer:
    """A server of what `collect` gives, and of facts of the process `pid`, to peers that come in by `listener`.

    collect: called for each scrape, on the thread that serves; its TimeoutError is a 503 for the peer.
    """
    server = _Server(listener)
    server.set_app(_app(collect, os.getpid() if pid is None else pid))
    return server


@contextmanager
def serving(address: str, collect: Collect) -> Iterator[None]:
    """Serve what `collect` gives at `address` on a thread while the block runs. Raises as `listen` does."""
    with listen(address) as listener, answer(listener, collect) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="specd-metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


class _Source:
    """What prometheus_client asks for metrics."""

    def __init__(self, collect: Collect) -> None:
        self.collect = collect

    def describe(self) -> list[Metric]:
        """None are known beforehand, so that registering asks for none."""
        return []


class _Server(WSGIServer):
    """A server of a socket that listens already, which asks no name service who it is."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_name, self.server_port = str(listener.getsockname()[0]), int(listener.getsockname()[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a scrape from %s failed", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = PEER_S

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def _app(collect: Collect, pid: int) -> Any:
    """The page itself: /metrics in the form that the peer asks for, 404 elsewhere."""
    from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(pid=lambda: pid, registry=registry)
    registry.register(_Source(collect))
    page = make_wsgi_app(registry)

    def give(environ: dict[str, Any], start_response: Any) -> Any:
        if environ.get("PATH_INFO") not in ("/", "/metrics"):
            return _say(start_response, "404 Not Found", "the metrics are at /metrics")
        try:
            return page(environ, start_response)
        except TimeoutError as error:
            return _say(start_response, "503 Service Unavailable", str(error))

    return give


def _say(start_response: Any, status: str, text: str) -> list[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{text}\n".encode()]
