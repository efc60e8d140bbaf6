"""The connector: short-lived threads that open a subscriber's sessions, and open them anew when they are lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import zmq

from specd.client.conversation import RETRY_S, Later, Waiting
from specd.client.guard import Guard
from specd.client.handshake import Session, Terms, open_session
from specd.client.interrupt import Interrupt
from specd.client.links import Link
from specd.errors import TransportError
from specd.memory.streams import on_device

log = logging.getLogger(__name__)


class Connector:
    """Opens sessions on the terms given, and retries for as long as a daemon asks for that.

    A transport that does not work is an error, unless it did before: then its daemon may be busy or restarting; or
    unless its daemon only stands by.

    opened: called with each session that is up; False if it is not wanted any more. closing: set when none is, which
    ends whatever the threads wait for.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        terms: Terms,
        opened: Callable[[Link, Session], bool],
        closing: Interrupt,
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
        """Wait for all threads; once closing, each ends soon."""
        for thread in self._threads:
            thread.join()

    def _run(self, link: Link) -> None:
        on_device(self._terms.device)
        said = False

        def tell(reason: Later | TransportError) -> None:
            nonlocal said
            if self._closing.is_set():
                return
            loading_s = reason.loading_s if isinstance(reason, Later) else 0.0
            link.problem = str(reason)
            link.loading_until = time.monotonic() + loading_s if loading_s else 0.0
            if not said:
                log.warning("waiting for %s: %s", link.endpoint, reason)
                said = True

        while not self._closing.is_set():
            terms = self._terms._replace(ranks=link.role.ranks)
            try:
                session = open_session(self._context, link.endpoint, terms, Waiting(self._closing, tell))
            except Later as later:
                tell(later)
                self._closing.wait(later.pause_s)
                continue
            except TransportError as error:
                if link.endpoint not in self._proven and not link.role.standby:
                    raise
                tell(error)
                self._closing.wait(RETRY_S)
                continue
            link.loading_until = 0.0
            self._proven.add(link.endpoint)
            # The first target met is the one every other daemon, and every later life of it, must serve.
            self._terms = self._terms._replace(fingerprint=session.welcome.contract.fingerprint)
            if not self._opened(link, session):
                session.client.close()
                session.hang_up()
            return
