"""The fetcher: a thread that pulls ready slots into staging buffers, one after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch

from specd.errors import TransportError
from specd.links import Entry
from specd.packing import ALIGNMENT
from specd.session import Session
from specd.transport import SlotRef

FETCH_S = 30.0
"""Longest a single transfer may take before it is tried again."""


class Fetcher:
    """Runs transports' client sides, which belong to its thread once their session is open.

    begin: asked before each transfer for the slot; None if the entry is no longer that session's. end: told after it,
    with the buffer and an empty problem, or with none and the reason. guard: runs the thread's body.
    """

    def __init__(
        self,
        device: str,
        begin: Callable[[Entry, Session], SlotRef | None],
        end: Callable[[Entry, Session, torch.Tensor | None, str], None],
        guard: Callable[[Callable[[], None]], None],
    ) -> None:
        self._device = device
        self._begin = begin
        self._end = end
        self._work: queue.SimpleQueue[tuple[Entry, Session] | Session | None] = queue.SimpleQueue()
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._thread = threading.Thread(target=guard, args=(self._run,), name="specd-fetch", daemon=True)
        self._thread.start()

    def fetch(self, entry: Entry, session: Session) -> None:
        """Pull a READY entry's slot, after those asked for before."""
        self._work.put((entry, session))

    def retire(self, session: Session) -> None:
        """Close a session's transport once the transfers asked for so far are over."""
        self._work.put(session)

    def recycle(self, buffer: torch.Tensor) -> None:
        """Take a staging buffer back; its bytes may be overwritten from now on."""
        self._free.put(buffer)

    def close(self) -> None:
        """Do what was asked for, then end."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            if isinstance(item, Session):
                item.client.close()
            else:
                self._pull(*item)

    def _pull(self, entry: Entry, session: Session) -> None:
        ref = self._begin(entry, session)
        if ref is None:
            return
        buffer = self._buffer(ref.nbytes)
        try:
            session.client.fetch(ref, buffer, FETCH_S)
        except TransportError as error:
            self.recycle(buffer)
            self._end(entry, session, None, str(error))
        else:
            self._end(entry, session, buffer, "")

    def _buffer(self, nbytes: int) -> torch.Tensor:
        """A page-aligned staging buffer of at least `nbytes`; as many exist as entries are under way or in use."""
        try:
            buffer = self._free.get_nowait()
        except queue.Empty:
            buffer = None
        if buffer is not None and buffer.numel() >= nbytes:
            return buffer
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self._device)
        return raw[-raw.data_ptr() % ALIGNMENT :][:size]
