"""A transport's serving side with an arena of its own, here or in a child process: what tests and benchmarks use."""

from __future__ import annotations

import contextlib
import multiprocessing
import secrets
import shutil
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Literal, Protocol

import msgspec
import numpy as np

from specd.arena import HostArena, remove
from specd.errors import TransportError
from specd.transport import ServerContext, SlotRef, Transport, load, pattern


class Host(Protocol):
    """A server, its arena, and what the worker would do with both."""

    def accept(self, session: bytes, hello: bytes) -> bytes: ...
    def publish(self, session: bytes, ref: SlotRef) -> None: ...
    def announce(self, session: bytes, ref: SlotRef) -> None:
        """`publish` without waiting for its outcome, as RECV_READY travels; a failure shows at the next call."""
        ...

    def drop(self, session: bytes) -> None: ...
    def begin(self, slot: int) -> None:
        """Start a refill of a slot: what it held is void."""
        ...

    def fill(self, slot: int, generation: int, nonce: bytes, nbytes: int) -> None:
        """Refill a slot with `pattern(nonce, nbytes)`."""
        ...

    def cpu_s(self) -> float:
        """CPU seconds of the process that serves, so far."""
        ...

    def close(self) -> None:
        """End the server, then free the arena. Idempotent."""
        ...


class LocalHost:
    """A host in this process.

    epoch, directory: its arena's name and a place for its sockets, made up when empty. tcp: an address of this machine
    to serve at as well, empty for none.
    """

    def __init__(
        self,
        transport: type[Transport],
        num_slots: int,
        slot_bytes: int,
        *,
        epoch: str = "",
        directory: str = "",
        tcp: str = "",
    ) -> None:
        self.epoch = epoch or secrets.token_hex(16)
        self._resources = contextlib.ExitStack()
        if not directory:
            directory = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="specd-host-"))
        try:
            shared = self.epoch if transport.traits.scope == "host" else None
            self._arena = self._resources.enter_context(HostArena.create(num_slots, slot_bytes, shared))
            self._server = transport.server(self._arena, ServerContext(directory=directory, host=tcp))
            self._resources.callback(self._server.close)
        except TransportError:
            self._resources.close()
            raise

    def accept(self, session: bytes, hello: bytes) -> bytes:
        return self._server.accept(session, hello)

    def publish(self, session: bytes, ref: SlotRef) -> None:
        self._server.publish(session, ref)

    def announce(self, session: bytes, ref: SlotRef) -> None:
        self._server.publish(session, ref)

    def drop(self, session: bytes) -> None:
        self._server.drop(session)

    def begin(self, slot: int) -> None:
        self._arena.begin(slot)

    def fill(self, slot: int, generation: int, nonce: bytes, nbytes: int) -> None:
        self._arena.begin(slot)
        np.frombuffer(self._arena.slot(slot), np.uint8)[:nbytes] = pattern(nonce, nbytes)
        self._arena.seal(slot, generation)

    def cpu_s(self) -> float:
        return time.process_time()

    def close(self) -> None:
        self._server.close()
        self._resources.close()


class _Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a Host's method."""

    method: Literal["accept", "publish", "drop", "begin", "fill", "cpu_s", "close"]
    session: bytes = b""
    data: bytes = b""
    slot: int = 0
    generation: int = 0
    nbytes: int = 0


class _Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What it returned, or the message of its TransportError."""

    data: bytes = b""
    number: float = 0.0
    error: str = ""


class SpawnedHost:
    """A host in a child process of its own. transport: its registered name."""

    def __init__(self, transport: str, num_slots: int, slot_bytes: int, *, tcp: str = "") -> None:
        context = multiprocessing.get_context("spawn")
        self.epoch = secrets.token_hex(16)
        self._owed = 0
        self._directory = tempfile.mkdtemp(prefix="specd-host-")  # ours to remove, however the child ends
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, transport, num_slots, slot_bytes, self.epoch, self._directory, tcp),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def accept(self, session: bytes, hello: bytes) -> bytes:
        return self._call(_Call(method="accept", session=session, data=hello)).data

    def publish(self, session: bytes, ref: SlotRef) -> None:
        self.announce(session, ref)
        self._settle()

    def announce(self, session: bytes, ref: SlotRef) -> None:
        self._settle()
        self._send(
            _Call(method="publish", session=session, slot=ref.slot, generation=ref.generation, nbytes=ref.nbytes)
        )
        self._owed += 1

    def drop(self, session: bytes) -> None:
        self._call(_Call(method="drop", session=session))

    def begin(self, slot: int) -> None:
        self._call(_Call(method="begin", slot=slot))

    def fill(self, slot: int, generation: int, nonce: bytes, nbytes: int) -> None:
        self._call(_Call(method="fill", slot=slot, generation=generation, data=nonce, nbytes=nbytes))

    def cpu_s(self) -> float:
        return self._call(_Call(method="cpu_s")).number

    def kill(self) -> None:
        """SIGKILL, as the worker may die; `close` is still to be called."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        if self._pipe.closed:
            return
        with contextlib.suppress(TransportError):
            self._call(_Call(method="close"))
        self._pipe.close()
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
        """Take the answers to what was only announced."""
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
            reply = msgspec.msgpack.decode(self._pipe.recv_bytes(), type=_Reply)
        except (EOFError, OSError):
            raise TransportError("the host process died; what it wrote to stderr says why") from None
        if reply.error:
            raise TransportError(reply.error)
        return reply


def _serve(
    pipe: Connection, transport: str, num_slots: int, slot_bytes: int, epoch: str, directory: str, tcp: str
) -> None:
    """The child: one call after the other, until told to close or the parent is gone."""
    try:
        host = LocalHost(load(transport), num_slots, slot_bytes, epoch=epoch, directory=directory, tcp=tcp)
    except TransportError as error:
        pipe.send_bytes(msgspec.msgpack.encode(_Reply(error=str(error))))
        return
    with contextlib.closing(host), contextlib.suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        pipe.send_bytes(msgspec.msgpack.encode(_Reply()))
        while True:
            call = msgspec.msgpack.decode(pipe.recv_bytes(), type=_Call)
            pipe.send_bytes(msgspec.msgpack.encode(_apply(host, call)))
            if call.method == "close":
                break


def _apply(host: LocalHost, call: _Call) -> _Reply:
    try:
        match call.method:
            case "accept":
                return _Reply(data=host.accept(call.session, call.data))
            case "publish":
                host.publish(call.session, SlotRef(call.slot, call.generation, call.nbytes))
            case "drop":
                host.drop(call.session)
            case "begin":
                host.begin(call.slot)
            case "fill":
                host.fill(call.slot, call.generation, call.data, call.nbytes)
            case "cpu_s":
                return _Reply(number=host.cpu_s())
            case "close":
                host.close()
    except TransportError as error:
        return _Reply(error=str(error))
    return _Reply()
