"""The fetcher: a thread that pulls ready slots into staging buffers, one after the other, or borrows them in place."""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from specd.errors import TransportError
from specd.links import Entry
from specd.session import Session
from specd.staging import Afterwards, Guard, Point, Staging, on_device
from specd.transport import Borrower, Client, SlotRef

if TYPE_CHECKING:
    import torch

FETCH_S = 30.0
"""Longest a single transfer may take before it is tried again."""

Begin = Callable[[Entry, Session], SlotRef | None]
End = Callable[[Entry, Session, "torch.Tensor | None", TransportError | None], None]


class Fetcher:
    """Runs transports' client sides, which belong to its thread once their session is open.

    num_buffers: of staging. begin: asked before each transfer for the slot; None if the entry is no longer that
    session's. end: told after it, with the buffer or the slot's view, or with none and the error. guard: runs the
    threads' bodies.
    """

    def __init__(self, device: str, num_buffers: int, begin: Begin, end: End, guard: Guard) -> None:
        self._device = device
        self._begin = begin
        self._end = end
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._afterwards = Afterwards(device, guard)
        self._staging = Staging(device, num_buffers, self._afterwards)
        self._lent: Counter[Client] = Counter()
        """How many views of each client's are not given back: unmapped under a kernel they would end the process."""
        self._retired: set[Client] = set()
        self._thread = threading.Thread(target=guard, args=(self._run,), name="specd-fetch", daemon=True)
        self._thread.start()

    def fetch(self, entry: Entry, session: Session) -> None:
        """Bring a READY entry home, after those asked for before."""
        self._work.put(partial(self._borrow if session.borrow else self._pull, entry, session))

    def recycle(self, buffer: torch.Tensor, after: Point | None = None) -> None:
        """Take a staging buffer back; its bytes may be overwritten once the training stream has come to `after`."""
        self._staging.give(buffer, after)

    def give_back(
        self, session: Session, ref: SlotRef, after: Point | None, returned: Callable[[TransportError | None], None]
    ) -> None:
        """Call `returned` once the training stream has come to `after` and no longer reads a borrowed slot.

        Its argument says why the slot was not the lent one's to the end, if it was not.
        """
        work = partial(self._work.put, partial(self._verify, session.client, ref, returned))
        self._afterwards.do(after, work)

    def unborrow(self, session: Session) -> None:
        """Take a view back that nobody has looked at."""
        self._work.put(partial(self._settle, session.client))

    def retire(self, session: Session) -> None:
        """Close a session's transport once the transfers asked for so far are over and no view of it is in use."""
        self._work.put(partial(self._retire, session.client))

    def stop(self) -> None:
        """Do what was asked for, then end the threads."""
        self._afterwards.close()
        self._work.put(None)
        self._thread.join()

    def close(self) -> None:
        """Stop, and do what was asked for since."""
        self.stop()
        while not self._work.empty():
            if (work := self._work.get()) is not None:
                work()

    def _run(self) -> None:
        on_device(self._device)
        while (work := self._work.get()) is not None:
            work()

    def _pull(self, entry: Entry, session: Session) -> None:
        buffer = self._staging.take(entry.layout.nbytes)  # the wait for it is not the wire's
        ref = self._begin(entry, session)
        if ref is None:
            self._staging.give(buffer)
            return
        try:
            session.client.fetch(ref, buffer, FETCH_S)
        except TransportError as error:
            if error.lost:
                self._staging.forget()
            else:
                self._staging.give(buffer)
            self._end(entry, session, None, error)
        else:
            self._end(entry, session, buffer, None)

    def _borrow(self, entry: Entry, session: Session) -> None:
        ref = self._begin(entry, session)
        if ref is None:
            return
        try:
            view = cast(Borrower, session.client).view(ref)
        except TransportError as error:
            self._end(entry, session, None, error)
        else:
            self._lent[session.client] += 1
            self._end(entry, session, view, None)

    def _verify(self, client: Client, ref: SlotRef, returned: Callable[[TransportError | None], None]) -> None:
        problem = None
        try:
            cast(Borrower, client).view(ref)
        except TransportError as error:
            problem = error
        self._settle(client)
        returned(problem)

    def _settle(self, client: Client) -> None:
        self._lent[client] -= 1
        if not self._lent[client] and client in self._retired:
            self._close(client)

    def _retire(self, client: Client) -> None:
        self._retired.add(client)
        if not self._lent[client]:
            self._close(client)

    def _close(self, client: Client) -> None:
        del self._lent[client]
        self._retired.discard(client)
        client.close()
