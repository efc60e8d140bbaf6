"""Carrier: the worker answers each RECV_READY with a file, which the trainer reads and removes. Slow and complete."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import msgspec

from specd.errors import TransportError
from specd.memory.arena import Arena
from specd.memory.cuda import Copier
from specd.transports.base import ServerContext, SlotRef, Traits
from specd.transports.checks import cancelled, check_into, check_ref, pull, stale, unwrap, wrap

if TYPE_CHECKING:
    import torch


class Offer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """directory: where the files of this session appear."""

    directory: str
    num_slots: int
    slot_bytes: int


class CarrierServer:
    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._root = tempfile.mkdtemp(prefix="specd-carrier-")
        self._copier = Copier()
        self._sessions: dict[bytes, str] = {}
        self._numbers = itertools.count()

    def accept(self, session: bytes, hello: bytes) -> bytes:
        if hello != b"carrier":
            raise TransportError(f"not a carrier hello: {hello[:20]!r}")
        self.drop(session)
        self._sessions[session] = directory = tempfile.mkdtemp(dir=self._root)
        num_slots, slot_bytes = self._arena.num_slots, self._arena.slot_bytes
        return wrap(Offer(directory=directory, num_slots=num_slots, slot_bytes=slot_bytes))

    def publish(self, session: bytes, ref: SlotRef) -> None:
        check_ref(ref, self._arena.num_slots, self._arena.slot_bytes)
        directory = self._sessions.get(session)
        if directory is None:
            raise TransportError(f"session {session.hex()[:8]} was not accepted over carrier, or was dropped")
        import torch

        copy = torch.empty(ref.nbytes, dtype=torch.uint8)
        try:
            pull(self._arena, ref, copy, self._copier)  # looks at the generation before and after the copy
        except TransportError:
            copy = copy[:0]  # an empty file says that the slot is gone
        # Numbered: batches of equal content share a slot, and each is fetched.
        name = Path(directory, f"{next(self._numbers):09}-{ref.slot}-{ref.generation}")
        part = name.with_suffix(".part")
        part.write_bytes(copy.numpy().data)
        part.replace(name)

    def drop(self, session: bytes) -> None:
        shutil.rmtree(self._sessions.pop(session, ""), ignore_errors=True)

    def close(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


class CarrierClient:
    def __init__(self) -> None:
        self._offer: Offer | None = None
        self._over = threading.Event()
        self._cancelled = False

    def hello(self) -> bytes:
        return b"carrier"

    def attach(self, offer: bytes, deadline_s: float) -> None:
        if self._cancelled:
            raise cancelled("carrier")
        found = unwrap(offer, Offer, "carrier offer")
        if "\0" in found.directory or not os.path.isdir(found.directory):
            raise TransportError(
                f"carrier directory {found.directory!r} is not here: the trainer must share the daemon's disk"
            )
        self._offer = found

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        import torch

        if self._cancelled:
            raise cancelled("carrier")
        if self._offer is None or self._over.is_set():
            raise TransportError("carrier: not attached, or closed")
        check_ref(ref, self._offer.num_slots, self._offer.slot_bytes)
        check_into(ref, into)
        pattern = f"*-{ref.slot}-{ref.generation}"
        deadline = time.monotonic() + deadline_s
        while not (found := sorted(Path(self._offer.directory).glob(pattern))):
            if time.monotonic() > deadline or self._over.wait(0.002):
                raise TransportError(f"carrier: {pattern} did not appear in time", lost=self._cancelled)
        name = found[0]
        data = bytearray(name.read_bytes())
        name.unlink()
        if len(data) < ref.nbytes:
            raise stale(ref, 0)
        into[: ref.nbytes].copy_(torch.frombuffer(data, dtype=torch.uint8)[: ref.nbytes])

    def cancel(self) -> None:
        self._cancelled = True
        self._over.set()

    def close(self) -> None:
        self._over.set()


class Carrier:
    traits: ClassVar[Traits] = Traits(
        memory=frozenset({"host"}), scope="host", one_sided=False, needs_recv_ready=True, abortable=True
    )

    @staticmethod
    def available(device: str) -> str | None:
        root = tempfile.gettempdir()
        return None if os.access(root, os.W_OK) else f"{root} cannot be written to"

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> CarrierServer:
        return CarrierServer(arena)

    @staticmethod
    def client(device: str) -> CarrierClient:
        return CarrierClient()
