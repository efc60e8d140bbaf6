"""Transfers over an NCCL communicator: the payload, then a note of which slot it was and its generation after the read.

The generation in the note tells whether the slot was refilled while it was sent.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from specd.protocol.cut import Piece
from specd.transports.nccl.communicator import Communicator
from specd.transports.nccl.side import ROW_BYTES
from specd.transports.nccl.watch import Watch
from specd.transports.pieces import pairs

if TYPE_CHECKING:
    import torch

NOTE: Final = struct.Struct("<QQQ32xQ")
"""Slot, generation, bytes; and the slot's generation when its bytes had been read."""
assert NOTE.size == ROW_BYTES
WORD_BYTES: Final = 8
WINDOW: Final = 8
"""Up to this many transfers are on the stream at once."""
STATE_S: Final = 10e-3
"""How often the communicator's state is read while a transfer is awaited."""


class Transfer:
    """A transfer in flight.

    over: whether the stream is past it. note: where the receiver finds the note then; None until it has begun.
    """

    __slots__ = ("note", "over")

    def __init__(self) -> None:
        self.over: Callable[[], bool] = _not_yet
        self.note: torch.Tensor | None = None


class _Owed(NamedTuple):
    """A note that is still to be sent. passed: whether the stream has written it, behind the payload."""

    transfer: Transfer
    note: torch.Tensor
    passed: Callable[[], bool]


class Transfers:
    """One end of the transfers over a communicator, which it owns from now on; one thread at a time.

    A note is a kernel of its own, which the wire idles for, unless the next payload travels in the same one. So `send`
    leaves it to the next `send`, or to `finish`.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._side = side = communicator.side
        self._owed: _Owed | None = None
        self._count = 0
        self._looked = 0.0
        try:
            with communicator.translated(), side.current():
                self._outgoing, self._incoming = (side.rows(WINDOW, on_host=True) for _ in range(2))
                self._sent, self._received = (side.rows(WINDOW, on_host=False) for _ in range(2))
        except BaseException:
            self.abort()
            raise

    def current(self) -> AbstractContextManager[None]:
        """Make the stream and its device the calling thread's, for `send`, `finish` and `receive`."""
        return self._side.current()

    @property
    def owing(self) -> bool:
        """Whether the last transfer's note is still to be sent."""
        return self._owed is not None

    def send(self, transfer: Transfer, payload: torch.Tensor, note: bytes, word: torch.Tensor, watch: Watch) -> None:
        """Put a payload on the stream, with the note that the transfer before it is owed.

        payload: uint8 [n] on the device. note: a NOTE; its last WORD_BYTES are replaced by `word`, page-locked host
        memory, as it is when the payload was read. Up to WINDOW may be in flight.
        """
        with self._communicator.translated():
            if self._owed is None:
                self._communicator.call("send", watch, payload)
            else:
                self._communicator.call("send", watch, self._owed.note, payload)
                self._owed.transfer.over = self._owed.passed
            # All else comes after the call, so that nothing delays the payload.
            row = self._next_row()
            self._outgoing.numpy()[row] = np.frombuffer(note, np.uint8)
            self._side.copy(self._sent[row], self._outgoing[row])
            self._side.copy(self._sent[row, -WORD_BYTES:], word)
            self._owed = _Owed(transfer, self._sent[row], self._side.mark())

    def gather(self, pieces: Sequence[Piece], into: torch.Tensor, slot: torch.Tensor) -> None:
        """Cut pieces out of a slot: once the stream, which is `current`, gets there, `into` is a payload to `send`.

        It may be the last payload's memory: by then that has left. What is of no piece becomes 0.
        """
        with self._communicator.translated():
            if sum(piece.rows * piece.width for piece in pieces) < into.numel():
                self._side.clear(into)
            for here, there in pairs(pieces, into, slot):
                self._side.copy(here, there)

    def finish(self, watch: Watch) -> None:
        """Put the note that is owed on the stream; until then the peer does not have the transfer."""
        owed, self._owed = self._owed, None
        if owed is not None:
            with self._communicator.translated():
                self._communicator.call("send", watch, owed.note)
                owed.transfer.over = self._side.mark()

    def receive(self, transfer: Transfer, into: torch.Tensor, watch: Watch) -> None:
        """Put the peer's next transfer on the stream; `into` (uint8 [n] on the device) has exactly its size."""
        row = self._next_row()
        with self._communicator.translated():
            self._communicator.call("recv", watch, into, self._received[row])
            self._side.copy(self._incoming[row], self._received[row])
            transfer.note = self._incoming[row]
            transfer.over = self._side.mark()

    def over(self, transfer: Transfer) -> bool:
        """Whether a transfer is over. Raises TransportError when the communicator failed: then none is, ever."""
        with self._communicator.translated():
            over, now = transfer.over(), time.monotonic()
            if over or now - self._looked > STATE_S:
                self._looked = now
                # After the look at the stream: what ended because of a failure must not be taken for received.
                over = self._communicator.settled() and over
            return over

    def abort(self, held: object = None) -> bool:
        """As `Communicator.abort`."""
        return self._communicator.abort((self, held))

    def _next_row(self) -> int:
        self._count += 1
        return self._count % WINDOW

    def __repr__(self) -> str:
        return f"Transfers({self._communicator})"


def _not_yet() -> bool:
    return False
