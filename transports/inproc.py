"""The inproc transport: daemon and trainer in one process; the reference that every other transport must equal."""

from __future__ import annotations

import secrets
import threading
from typing import TYPE_CHECKING, ClassVar, Final

from specd.errors import TransportError
from specd.memory.cuda import Copier
from specd.transports.base import ServerContext, SlotRef, Traits
from specd.transports.checks import cancelled, pull

if TYPE_CHECKING:
    import torch

    from specd.memory.arena import Arena

_TOKEN_BYTES: Final = 16
_arenas: Final[dict[bytes, Arena]] = {}
"""The arena each accepted session may read, by the token in its offer; the only state two sides share."""


class InprocServer:
    """Hands each session a token for the arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._tokens: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        self._closed = False

    def accept(self, session: bytes, hello: bytes) -> bytes:
        if hello:
            raise TransportError(f"inproc hello has {len(hello)} bytes: expected none")
        token = secrets.token_bytes(_TOKEN_BYTES)
        with self._lock:
            if self._closed:
                raise TransportError("the inproc server is closed")
            _arenas.pop(self._tokens.pop(session, b""), None)
            self._tokens[session] = token
            _arenas[token] = self._arena
        return token

    def publish(self, session: bytes, ref: SlotRef) -> None:
        raise TransportError("inproc is pulled by the trainer: it never publishes")

    def drop(self, session: bytes) -> None:
        with self._lock:
            _arenas.pop(self._tokens.pop(session, b""), None)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for token in self._tokens.values():
                _arenas.pop(token, None)
            self._tokens.clear()

    def __repr__(self) -> str:
        return f"InprocServer({len(self._tokens)} sessions)"


class InprocClient:
    """Copies out of the arena that its token names."""

    def __init__(self) -> None:
        self._token = b""
        self._cancelled = False
        self._copier = Copier()

    def hello(self) -> bytes:
        return b""

    def attach(self, offer: bytes, deadline_s: float) -> None:
        if self._cancelled:
            raise cancelled("inproc")
        if len(offer) != _TOKEN_BYTES or bytes(offer) not in _arenas:
            raise TransportError("the inproc offer names no arena of this process: inproc is for co-located runs only")
        self._token = bytes(offer)

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        if self._cancelled:
            raise cancelled("inproc")
        arena = _arenas.get(self._token)
        if arena is None:
            raise TransportError("inproc: not attached, or the daemon ended the session")
        pull(arena, ref, into, self._copier)

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        self._token = b""

    def __repr__(self) -> str:
        return f"InprocClient({'attached' if self._token in _arenas else 'not attached'})"


class Inproc:
    """Registry entry of `inproc`."""

    traits: ClassVar[Traits] = Traits(
        memory=frozenset({"host", "device"}),
        scope="process",
        one_sided=True,
        needs_recv_ready=False,
        abortable=True,
        cuts=True,
        rank=100,
    )

    @staticmethod
    def available(device: str) -> None:
        return None

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> InprocServer:
        return InprocServer(arena)

    @staticmethod
    def client(device: str) -> InprocClient:
        return InprocClient()
