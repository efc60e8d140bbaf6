"""The fetcher: a thread that pulls ready slots into staging buffers, one after the other, or borrows them in place."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from specd.client.handshake import Session
from specd.client.staging import Afterwards, Staging
from specd.client.state import Entry, Guard
from specd.errors import TransportError
from specd.memory.streams import Point, on_device
from specd.transports.base import Borrower, Client, Receiver, SlotRef

if TYPE_CHECKING:
    import torch

FETCH_S = 30.0
"""Longest a single transfer may take before it is tried again."""

Begin = Callable[[Entry, Session], SlotRef | None]
End = Callable[[Entry, Session, "torch.Tensor | None", TransportError | None], None]


class _Pull:
    """An entry to be pulled. ref, buffer: from where and to where, once it has begun and is still its session's."""

    __slots__ = ("begun", "buffer", "entry", "ref", "session")

    def __init__(self, entry: Entry, session: Session) -> None:
        self.entry = entry
        self.session = session
        self.begun = False
        self.ref: SlotRef | None = None
        self.buffer: torch.Tensor | None = None


class Fetcher:
    """Runs transports' client sides, which belong to its thread once their session is open.

    A Receiver is told of all that was asked for and has a free buffer before the first of it is waited for.

    num_buffers: of staging. begin: asked before each transfer for the slot; None if the entry is no longer that
    session's. end: told after it, with the buffer or the slot's view, or with none and the error. guard: runs the
    threads' bodies.
    """

    def __init__(self, device: str, num_buffers: int, begin: Begin, end: End, guard: Guard) -> None:
        self._device = device
        self._begin = begin
        self._end = end
        self._work: queue.SimpleQueue[Callable[[], None] | _Pull | None] = queue.SimpleQueue()
        self._ahead: deque[Callable[[], None] | _Pull | None] = deque()
        """What was taken from `_work` to look at, and is still to be done."""
        self._afterwards = Afterwards(device, guard)
        self._staging = Staging(device, num_buffers, self._afterwards)
        self._lent: Counter[Client] = Counter()
        """How many views of each client's are not given back: unmapped under a kernel they would end the process."""
        self._retired: set[Client] = set()
        self._thread = threading.Thread(target=guard, args=(self._run,), name="specd-fetch", daemon=True)
        self._thread.start()

    def fetch(self, entry: Entry, session: Session) -> None:
        """Bring a READY entry home, after those asked for before."""
        self._work.put(partial(self._borrow, entry, session) if session.borrow else _Pull(entry, session))

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
        """Close a session's transport once the transfers asked for so far are over and no view of it is in use.

        A Receiver's are called off: every daemon's batches would wait for the one that waits for a daemon that is gone.
        """
        if isinstance(session.client, Receiver):
            session.client.call_off()
        self._work.put(partial(self._retire, session.client))

    def stop(self) -> None:
        """Do what was asked for, then end the threads."""
        self._afterwards.close()
        self._work.put(None)
        self._thread.join()

    def close(self) -> None:
        """Stop, and do what was asked for since."""
        self.stop()
        self._look()
        while self._ahead:
            if (work := self._ahead.popleft()) is not None:
                self._do(work)

    def _run(self) -> None:
        on_device(self._device)
        while (work := self._ahead.popleft() if self._ahead else self._work.get()) is not None:
            self._do(work)

    def _do(self, work: Callable[[], None] | _Pull) -> None:
        if isinstance(work, _Pull):
            self._pull(work)
        else:
            work()

    def _pull(self, pull: _Pull) -> None:
        new = not pull.begun  # then no transfer is under way
        own = [(pull, self._staging.take(pull.entry.layout.nbytes))] if new else []  # the wait for it is not the wire's
        # First all buffers: an allocation may wait for whatever is on the device, and a transfer for a peer that died.
        for each, place in own + self._following(new):
            self._start(each, place)
        entry, session, ref, buffer = pull.entry, pull.session, pull.ref, pull.buffer
        if ref is None or buffer is None:
            return
        entry.began = time.monotonic()  # it may have begun behind others, whose time is not its own
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

    def _look(self) -> None:
        """See what is to be done."""
        while not self._work.empty():
            self._ahead.append(self._work.get())

    def _following(self, new: bool) -> list[tuple[_Pull, torch.Tensor]]:
        """What comes next and can begin, with its buffer: as far as it is for Receivers and there are buffers."""
        self._look()
        found: list[tuple[_Pull, torch.Tensor]] = []
        for work in self._ahead:
            if not isinstance(work, _Pull) or not isinstance(work.session.client, Receiver):
                break
            if not work.begun:
                buffer = self._staging.spare(work.entry.layout.nbytes, new)
                if buffer is None:
                    break
                found.append((work, buffer))
        return found

    def _start(self, pull: _Pull, buffer: torch.Tensor) -> None:
        """Have a pull's bytes come to `buffer`, unless its session has nothing more to send for it."""
        pull.begun = True
        pull.ref = self._begin(pull.entry, pull.session)
        if pull.ref is None:
            self._staging.give(buffer)
            return
        pull.buffer = buffer
        if isinstance(pull.session.client, Receiver):
            pull.session.client.expect(pull.ref, buffer)

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
