"""What the window wants done, as data: messages for the I/O loop, transfers and buffers for the fetcher."""

from __future__ import annotations

from typing import Generic

import msgspec

from specd.client.pending import B, Pending, S
from specd.transports.base import SlotRef


class SendSubmit(msgspec.Struct, Generic[S, B], frozen=True):
    """Send SUBMIT. late: seconds that another daemon has owed the batch, to be logged, or 0. keep: as in SUBMIT."""

    session: S
    pending: Pending[S, B]
    late: float = 0.0
    keep: bool = True


class SendRecvReady(msgspec.Struct, Generic[S], frozen=True):
    """Send RECV_READY."""

    session: S
    lease: int


class SendBorrow(msgspec.Struct, Generic[S], frozen=True):
    """Send BORROW, before there is a view."""

    session: S
    lease: int


class SendRelease(msgspec.Struct, Generic[S], frozen=True):
    """Send RELEASE."""

    session: S
    lease: int


class Abandon(msgspec.Struct, Generic[S], frozen=True):
    """End a session whose transport is lost, and open it anew."""

    session: S
    reason: str


class Cancel(msgspec.Struct, Generic[S], frozen=True):
    """Cancel the transfer in flight of a session, which fails then, and with it the session's transport."""

    session: S
    reason: str


class FetchSlot(msgspec.Struct, Generic[S, B], frozen=True):
    """Transfer a READY batch, or view its slot, behind those of earlier effects."""

    session: S
    pending: Pending[S, B]


class Missed(msgspec.Struct, Generic[S, B], frozen=True):
    """Log that a transfer brought nothing."""

    session: S
    pending: Pending[S, B]
    reason: str


class Unborrow(msgspec.Struct, Generic[S], frozen=True):
    """Drop the view of a borrowed slot that was not taken."""

    session: S


class Recycle(msgspec.Struct, Generic[B], frozen=True):
    """Take a staging buffer back, once the training stream has read it."""

    buffer: B


class Return(msgspec.Struct, Generic[S, B], frozen=True):
    """Drop the view of a borrowed slot once the training stream has read it, and say so by `Window.returned`."""

    session: S
    ref: SlotRef
    pending: Pending[S, B]


Effect = (
    SendSubmit[S, B]
    | SendRecvReady[S]
    | SendBorrow[S]
    | SendRelease[S]
    | Abandon[S]
    | Cancel[S]
    | FetchSlot[S, B]
    | Missed[S, B]
    | Unborrow[S]
    | Recycle[B]
    | Return[S, B]
)
