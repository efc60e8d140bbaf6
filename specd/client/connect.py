"""The connector: short-lived threads that open a subscriber's sessions, and open them anew when they are lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import zmq

from specd.client.guard import Guard
from specd.client.handshake import Later, Session, Terms, open_session
from specd.client.links import Link
from specd.errors import TransportError
from specd.memory.streams import on_device

log = logging.getLogger(__name__)

RETRY_S = 0.3
"""Back-off before a transport that worked is tried again."""


class Connector:
    """Opens sessions on the terms given, and retries for as long as a daemon asks for that.

    A transport that does not work is an error, unless it did before: then its daemon may be busy or restarting.

    opened: called with each session that is up; False if it is not wanted any more. closing: set when none is.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        terms: Terms,
        opened: Callable[[Link, Session], bool],
        closing: threading.Event,
        guard: Guard,
    ) -> None:
        self._context = context
        self._terms = terms
        self._opened = opened
        self._closing = closing
        self._guard = guard
        self._threads: set[threading.Thread] = set()
        self._proven: set[str] = set()

    def connect(self, link: Link) -> None:
        """Open a session with an endpoint."""
        thread = self._guard.start("specd-connect", self._run, link)
        self._threads = {other for other in self._threads if other.is_alive()} | {thread}

    def join(self) -> None:
        """Wait for all threads; once closing, each ends within the step it is at."""
        for thread in self._threads:
            thread.join()

    def _run(self, link: Link) -> None:
        on_device(self._terms.device)
        said = False
        while not self._closing.is_set():
            try:
                session = open_session(self._context, link.endpoint, self._terms, self._closing.wait)
            except (Later, TransportError) as reason:
                if isinstance(reason, TransportError):
                    if link.endpoint not in self._proven:
                        raise
                    self._closing.wait(RETRY_S)
                link.problem = str(reason)
                if not said:
                    log.warning("waiting for %s: %s", link.endpoint, reason)
                    said = True
                continue
            self._proven.add(link.endpoint)
            # The first target met is the one every other daemon, and every later life of it, must serve.
            self._terms = self._terms._replace(fingerprint=session.welcome.contract.fingerprint)
            if not self._opened(link, session):
                session.client.close()
                session.hang_up()
            return
