"""A host in a child process, driven by messages over a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import ClassVar, Final, Literal, NamedTuple

import msgspec

from specd.errors import TransportError
from specd.memory.segment import remove
from specd.protocol.cut import Piece
from specd.transports.base import SlotRef
from specd.transports.registry import load
from specd.transports.testing.hosts import LocalHost

SAFE_PATH: Final = "PYTHONSAFEPATH"
ANSWER_S: Final = 120.0
"""Longest wait for one answer of the child; its first one covers the start of CUDA."""
_starting = threading.Lock()


class _Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a Host's method, or of its constructor."""

    method: Literal["open", "accept", "publish", "drop", "begin", "fill", "ask", "close"]
    transport: str = ""
    epoch: str = ""
    session: bytes = b""
    data: bytes = b""
    slot: int = 0
    generation: int = 0
    nbytes: int = 0
    pieces: tuple[Piece, ...] = ()
    what: str = ""


class _Reply(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a call, or the message of its TransportError."""

    data: bytes = b""
    number: float = 0.0
    error: str = ""


class _Setup(NamedTuple):
    """What every host of a child has in common. env: the child's environment, beyond what it inherits."""

    kind: type[LocalHost]
    num_slots: int
    slot_bytes: int
    device: str
    directory: str
    tcp: str
    env: dict[str, str]


class SpawnedHost:
    """A host in a child process of its own.

    transport: its registered name. device, tcp: see LocalHost. env: what the child has in its environment beyond this
    process's, before it imports a device library. lasting: the child outlives `close`, until `end`; `reopen` then
    serves anew, from an arena that was never filled.
    """

    kind: ClassVar[type[LocalHost]] = LocalHost
    """What the child makes: for a subclass that has more to `ask`."""

    def __init__(
        self,
        transport: str,
        num_slots: int,
        slot_bytes: int,
        *,
        device: str = "cpu",
        tcp: str = "",
        env: Mapping[str, str] | None = None,
        lasting: bool = False,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.epoch = secrets.token_hex(16)
        self._owed = 0
        self._lasting = lasting
        self._open = True
        self._directory = tempfile.mkdtemp(prefix="specd-host-")  # ours to remove, however the child ends
        self._pipe, theirs = context.Pipe()
        setup = _Setup(self.kind, num_slots, slot_bytes, device, self._directory, tcp, dict(env or {}))
        self._process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
        with no_working_directory():
            self._process.start()
        theirs.close()
        try:
            self._call(_Call(method="open", transport=transport, epoch=self.epoch))
        except BaseException:
            self.end()
            raise

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid or 0

    def accept(self, session: bytes, hello: bytes) -> bytes:
        return self._call(_Call(method="accept", session=session, data=hello)).data

    def publish(self, session: bytes, ref: SlotRef) -> None:
        self.announce(session, ref)
        self._settle()

    def announce(self, session: bytes, ref: SlotRef) -> None:
        self._settle()
        self._send(_Call(method="publish", session=session, **ref._asdict()))
        self._owed += 1

    def drop(self, session: bytes) -> None:
        self._call(_Call(method="drop", session=session))

    def begin(self, slot: int) -> None:
        self._call(_Call(method="begin", slot=slot))

    def fill(self, slot: int, generation: int, nonce: bytes, nbytes: int) -> None:
        self._call(_Call(method="fill", slot=slot, generation=generation, data=nonce, nbytes=nbytes))

    def ask(self, what: str) -> float:
        """See LocalHost; the child's answer."""
        return self._call(_Call(method="ask", what=what)).number

    def kill(self) -> None:
        """SIGKILL, as the worker may die; `close` is still to be called."""
        self._process.kill()
        self._process.join()

    def reopen(self, transport: str) -> None:
        """Serve anew, in the same child but from a new arena. Raises TransportError when that cannot be."""
        self.close()
        self.epoch = secrets.token_hex(16)
        self._call(_Call(method="open", transport=transport, epoch=self.epoch))
        self._open = True

    def close(self) -> None:
        if not self._lasting:
            self.end()
        elif self._open:
            self._open = False
            with contextlib.suppress(TransportError):
                self._call(_Call(method="close"))
            remove(self.epoch)

    def end(self) -> None:
        """End the child, too. Idempotent."""
        if self._pipe.closed:
            return
        with contextlib.suppress(TransportError):
            self._call(_Call(method="close"))
        self._pipe.close()  # what the child ends by
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        remove(self.epoch)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _call(self, call: _Call) -> _Reply:
        self._settle()
        self._send(call)
        return self._answer()

    def _settle(self) -> None:
        """Take the answers that `announce` did not wait for."""
        while self._owed:
            self._owed -= 1
            self._answer()

    def _send(self, call: _Call) -> None:
        try:
            self._pipe.send_bytes(msgspec.msgpack.encode(call))
        except OSError:
            raise TransportError("the host process is gone") from None

    def _answer(self) -> _Reply:
        try:
            if not self._pipe.poll(ANSWER_S):
                self.kill()  # a late answer would be taken for that of the next call
                raise TransportError(f"the host process did not answer within {ANSWER_S:g} s and was killed")
            reply = msgspec.msgpack.decode(self._pipe.recv_bytes(), type=_Reply)
        except (EOFError, OSError):
            raise TransportError("the host process died; what it wrote to stderr says why") from None
        if reply.error:
            raise TransportError(reply.error)
        return reply


@contextlib.contextmanager
def no_working_directory() -> Iterator[None]:
    """Python processes that start in the block look for no modules in the working directory, as with `-P`.

    One thread at a time: blocks that overlapped would restore each other's setting, and leave it behind.
    """
    with _starting:
        before = os.environ.get(SAFE_PATH)
        os.environ[SAFE_PATH] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[SAFE_PATH]
            else:
                os.environ[SAFE_PATH] = before


def _serve(pipe: Connection, setup: _Setup) -> None:
    """The child: one call after the other, until the parent closes the pipe or is gone."""
    os.environ.update(setup.env)
    host: LocalHost | None = None
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        while True:
            call = msgspec.msgpack.decode(pipe.recv_bytes(), type=_Call)
            try:
                if call.method == "open":
                    host = _open(setup, call)
                    reply = _Reply()
                elif host is None:
                    reply = _Reply(error="nothing is served: the host could not be opened")
                else:
                    reply = _apply(host, call)
            except TransportError as error:
                reply = _Reply(error=str(error))
            pipe.send_bytes(msgspec.msgpack.encode(reply))
    if host is not None:
        host.close()


def _open(setup: _Setup, call: _Call) -> LocalHost:
    return setup.kind(
        load(call.transport),
        setup.num_slots,
        setup.slot_bytes,
        device=setup.device,
        epoch=call.epoch,
        directory=setup.directory,
        tcp=setup.tcp,
    )


def _apply(host: LocalHost, call: _Call) -> _Reply:
    match call.method:
        case "accept":
            return _Reply(data=host.accept(call.session, call.data))
        case "publish":
            host.publish(call.session, SlotRef(call.slot, call.generation, call.nbytes, call.pieces))
        case "drop":
            host.drop(call.session)
        case "begin":
            host.begin(call.slot)
        case "fill":
            host.fill(call.slot, call.generation, call.data, call.nbytes)
        case "ask":
            return _Reply(number=host.ask(call.what))
        case "close":
            host.close()
    return _Reply()
