"""The fetcher: a thread that transfers READY batches into staging buffers, one by one, or views their slots."""

from __future__ import annotations

import queue
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from specd.client.guard import Guard
from specd.client.handshake import Session
from specd.client.pending import Pending
from specd.client.staging import Afterwards, Staging
from specd.errors import TransportError
from specd.memory.streams import Point, on_device
from specd.transports.base import Borrower, Client, Receiver, SlotRef

if TYPE_CHECKING:
    import torch

FETCH_S = 30.0
"""Longest a single transfer may stand still before it is retried; see `Client.fetch`."""
GRACE_S = 0.5
"""How long a transfer that is under way may go on when the fetcher is stopped."""

Item = Pending[Session, "torch.Tensor"]
"""A batch in flight, with the sessions and buffers of a running subscriber."""
Begin = Callable[[Item, Session], SlotRef | None]
End = Callable[[Item, "torch.Tensor | TransportError", float], None]


class _Pull:
    """A batch to be transferred. ref, buffer: from where and to where, once it has begun and is still wanted."""

    __slots__ = ("begun", "buffer", "pending", "ref", "session")

    def __init__(self, pending: Item, session: Session) -> None:
        self.pending = pending
        self.session = session
        self.begun = False
        self.ref: SlotRef | None = None
        self.buffer: torch.Tensor | None = None


class Fetcher:
    """Runs the transports' client sides, which belong to its thread once their session is open.

    A Receiver expects all batches that were asked for and have a free buffer before the first of them is waited for.

    num_buffers: of staging. begin: asked before each transfer for its slot; None if the batch is no longer that
    session's. end: called after it with the buffer, the view of the slot, or the error, and the seconds it took.
    """

    def __init__(self, device: str, num_buffers: int, begin: Begin, end: End, guard: Guard) -> None:
        self._device = device
        self._begin = begin
        self._end = end
        self._work: queue.SimpleQueue[Callable[[], None] | _Pull | None] = queue.SimpleQueue()
        self._ahead: deque[Callable[[], None] | _Pull | None] = deque()
        """Taken from `_work` to look ahead, and still to be done."""
        self._afterwards = Afterwards(device, guard)
        self._staging = Staging(device, num_buffers, self._afterwards)
        self._lent: Counter[Client] = Counter()
        """Views of each client that are in use: unmapped under a kernel they would end the process."""
        self._retired: set[Client] = set()
        self._asked: set[Client] = set()
        """Those that may have a transfer under way, or still to come."""
        self._cancelled = False
        self._thread = guard.start("specd-fetch", self._run)

    def fetch(self, pending: Item, session: Session) -> None:
        """Transfer a READY batch, or view its slot, behind those asked for before."""
        self._asked.add(session.client)
        self._work.put(partial(self._borrow, pending, session) if pending.borrowed else _Pull(pending, session))

    def recycle(self, buffer: torch.Tensor, after: Point | None = None) -> None:
        """Take a staging buffer back; its bytes may be overwritten once the training stream has come to `after`."""
        self._staging.give(buffer, after)

    def give_back(
        self, session: Session, ref: SlotRef, after: Point | None, returned: Callable[[TransportError | None], None]
    ) -> None:
        """Drop the view of a borrowed slot once the training stream has come to `after`, then call `returned`.

        Its argument is an error if the slot was overwritten while it was borrowed.
        """
        work = partial(self._work.put, partial(self._verify, session.client, ref, returned))
        self._afterwards.do(after, work)

    def unborrow(self, session: Session) -> None:
        """Drop a view that was not taken."""
        self._work.put(partial(self._settle, session.client))

    def retire(self, session: Session) -> None:
        """Close a lost session's transport, behind the transfers asked for so far, once no view of it is in use.

        Its transfers are cancelled: the fetch thread is serial, one dead daemon would block all.
        """
        session.client.cancel()
        self._work.put(partial(self._retire, session.client))

    def stop(self) -> None:
        """Do all that was asked for, then end the threads; transfers that do not end soon are cancelled."""
        self._afterwards.close()
        self._work.put(None)
        self._thread.join(GRACE_S)
        if self._thread.is_alive():
            self._cancelled = True
            for client in tuple(self._asked):
                client.cancel()
            self._thread.join()

    def close(self) -> None:
        """Stop, and do on this thread what was asked for since."""
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
        own = [(pull, self._staging.take(pull.pending.layout.nbytes))] if new else []  # that wait is not the wire's
        # First all buffers: an allocation may wait for whatever is on the device, and a transfer for a peer that died.
        for each, place in own + self._following(new):
            self._start(each, place)
        ref, buffer = pull.ref, pull.buffer
        if ref is None or buffer is None:
            return
        began = time.monotonic()  # it may have begun behind others, whose time is not its own
        try:
            pull.session.client.fetch(ref, buffer, FETCH_S)
        except TransportError as error:
            if error.lost:
                self._staging.forget()
            else:
                self._staging.give(buffer)
            if not self._cancelled:  # nobody waits for it any more, and no session is to be opened anew
                self._end(pull.pending, error, time.monotonic() - began)
        else:
            self._end(pull.pending, buffer, time.monotonic() - began)

    def _look(self) -> None:
        """Look at all that was asked for."""
        while not self._work.empty():
            self._ahead.append(self._work.get())

    def _following(self, new: bool) -> list[tuple[_Pull, torch.Tensor]]:
        """The next transfers that can begin, and their buffers, as far as they are Receivers' and there are buffers."""
        self._look()
        found: list[tuple[_Pull, torch.Tensor]] = []
        for work in self._ahead:
            if not isinstance(work, _Pull) or not isinstance(work.session.client, Receiver):
                break
            if not work.begun:
                buffer = self._staging.spare(work.pending.layout.nbytes, new)
                if buffer is None:
                    break
                found.append((work, buffer))
        return found

    def _start(self, pull: _Pull, buffer: torch.Tensor) -> None:
        """Begin a transfer to `buffer`, unless it is no longer wanted."""
        pull.begun = True
        pull.ref = self._begin(pull.pending, pull.session)
        if pull.ref is None:
            self._staging.give(buffer)
            return
        pull.buffer = buffer
        if isinstance(pull.session.client, Receiver):
            pull.session.client.expect(pull.ref, buffer)

    def _borrow(self, pending: Item, session: Session) -> None:
        ref = self._begin(pending, session)
        if ref is None:
            return
        began = time.monotonic()
        try:
            view = cast(Borrower, session.client).view(ref)
        except TransportError as error:
            self._end(pending, error, time.monotonic() - began)
        else:
            self._lent[session.client] += 1
            self._end(pending, view, time.monotonic() - began)

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
        self._asked.discard(client)
        self._retired.discard(client)
        client.close()
