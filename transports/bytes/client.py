"""The trainer's side of the bytes transport: receives chunks straight into the destination."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

import zmq

from specd.curve import keys
from specd.endpoints import boot_id
from specd.errors import TransportError
from specd.memory import cuda
from specd.transports.base import SlotRef
from specd.transports.bytes.frames import WINDOW, Header, Kind, checksum, unpack
from specd.transports.bytes.socket import BytesHello, BytesOffer, connect, usable
from specd.transports.checks import cancelled, check_into, check_ref, stale, unwrap, wrap

if TYPE_CHECKING:
    import torch


class BytesClient:
    """One attached trainer; every chunk is checked. A lost connection stays lost: attach anew.

    device: where `fetch` delivers. Raises TransportError when it is not here.
    """

    def __init__(self, device: str) -> None:
        if device != "cpu":
            cuda.ordinal(device)
        self._lock = threading.Lock()
        """Held while the socket is used: attach, fetch and close may come from different threads."""
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.Lock()
        self._closed = False
        self._cancelled = False
        self._zmq: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        """Where libzmq reports that the connection is lost, so that a dead daemon does not cost a deadline."""
        self._poller = zmq.Poller()
        self._offer: BytesOffer | None = None
        self._pair = keys.draw()
        """Of the next attach: the worker lets in its holder."""
        self._taken = 0
        self._transfer = -1
        """The transfer that is being taken, as the worker counts them; −1 until its first chunk is here."""
        self._unwanted = -1
        """The last one that the worker was told not to go on with."""
        self._remains = 0
        """How many chunks of fetches that were given up may still come, at most."""
        self._staging: torch.Tensor | None = None
        self._copier = cuda.Copier()
        self.ignored = 0
        """Messages dropped: not of this protocol, or of a cancelled transfer."""

    def hello(self) -> bytes:
        self._pair = keys.draw()
        return wrap(BytesHello(host=boot_id(), key=self._pair.public))

    def attach(self, offer: bytes, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        found = unwrap(offer, BytesOffer, "bytes offer")
        endpoint = usable(found)
        with self._lock:
            self._check_open()
            self._disconnect()
            self._zmq = zmq.Context()
            self._socket, self._monitor = connect(self._zmq, endpoint, found.token, self._pair, found.key)
            self._poller = zmq.Poller()
            self._poller.register(self._monitor, zmq.POLLIN)
            self._poller.register(self._socket, zmq.POLLIN)
            self._poller.register(self._wake, zmq.POLLIN)
            self._taken = self._remains = 0
            self._unwanted = -1
            try:
                try:
                    self._socket.send(Header(Kind.HELLO).pack(), zmq.NOBLOCK)
                except zmq.Again:  # there is no connection to queue it on, nor will there be one again
                    raise _lost(f"{endpoint} had not answered") from None
                while self._next(deadline, f"{endpoint} had not answered").kind is not Kind.WELCOME:
                    self.ignored += 1
            except TransportError:
                self._disconnect()
                raise
            self._offer = found

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        with self._lock:
            self._check_open()
            if self._offer is None:
                raise TransportError("bytes: not attached, or closed")
            check_ref(ref, self._offer.num_slots, self._offer.slot_bytes, cuts=True)
            check_into(ref, into)
            host = into[: ref.nbytes] if into.device.type == "cpu" else self._stage(ref.nbytes)
            try:
                self._take(ref, host.numpy().data, deadline_s)
            except TransportError:
                self._remains += WINDOW
                if self._transfer >= 0:  # a later announcement has another number
                    self._refuse(self._transfer)
                raise
            if host.device != into.device:
                self._copier.copy(into[: ref.nbytes], host)

    def cancel(self) -> None:
        with self._closing:
            if not self._closed:
                self._cancelled = True
                os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        with self._lock:
            self._disconnect()
            self._staging = None
            os.close(self._wake)

    def _disconnect(self) -> None:
        self._offer = None
        if self._socket is not None:
            if self._monitor is not None:
                self._socket.disable_monitor()
                self._monitor.close(linger=0)
                self._monitor = None
            self._socket.close(linger=0)
            self._socket = None
        if self._zmq is not None:
            self._zmq.term()
            self._zmq = None

    def _stage(self, nbytes: int) -> torch.Tensor:
        """Host memory on the way to a device, page-locked and kept."""
        import torch

        if self._staging is None or self._staging.numel() < nbytes:
            self._staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        return self._staging[:nbytes]

    def _take(self, ref: SlotRef, into: memoryview, deadline_s: float) -> None:
        """Fill `into` with one whole transfer of `ref`, chunk after chunk without gap or overlap.

        Its progress is a chunk that brings it further than it ever was. So are the last chunks of fetches that were
        given up, as they come first: on a slow link they take longer than `deadline_s`, and every fetch would fail.
        """
        socket = self._socket
        assert socket is not None
        self._transfer, end, furthest = -1, 0, 0
        deadline = time.monotonic() + deadline_s
        while end < ref.nbytes:
            header = self._next(deadline, f"slot {ref.slot} came to {end} of {ref.nbytes} bytes")
            if header.kind is Kind.GONE and (header.slot, header.generation) == (ref.slot, ref.generation):
                self._acknowledge()
                raise stale(ref, 0)
            if header.kind is not Kind.CHUNK:
                self.ignored += 1
                if header.kind is Kind.GONE:
                    self._acknowledge()
                continue
            ours = (header.slot, header.generation, header.total) == (ref.slot, ref.generation, ref.nbytes)
            if ours and header.offset == 0:  # the first chunk, or the first of a new try
                self._transfer, end = header.transfer, 0
            follows = (header.transfer, header.offset) == (
                self._transfer,
                end,
            ) and 1 <= header.length <= ref.nbytes - end
            if not (ours and follows and socket.get(zmq.RCVMORE)):
                self.ignored += 1
                self._skip()
                self._acknowledge()
                if header.transfer not in (self._transfer, self._unwanted):
                    self._refuse(header.transfer)
                if self._remains:
                    self._remains -= 1
                    deadline = time.monotonic() + deadline_s
                continue
            place = into[end : end + header.length]
            received = socket.recv_into(place)
            self._skip()
            self._acknowledge()
            if received != header.length or checksum(place) != header.checksum:
                raise TransportError(
                    f"slot {ref.slot}, bytes {end} to {end + header.length}: the checksum does not match: the slot was "
                    f"refilled under the transfer, or the connection is faulty; submit again"
                )
            end += header.length
            if end > furthest:
                furthest, deadline = end, time.monotonic() + deadline_s

    def _next(self, deadline: float, state: str) -> Header:
        """The header of the next message that has one; its payload, if any, is still to be received."""
        socket = self._socket
        assert socket is not None
        while True:
            self._check_open()
            try:
                header = unpack(socket.recv(zmq.NOBLOCK))
                if header is not None:
                    return header
                self._skip()
                self.ignored += 1
            except zmq.Again:
                left_ms = (deadline - time.monotonic()) * 1000
                ready = dict(self._poller.poll(max(0, round(left_ms + 0.5)))) if left_ms > 0 else {}
                self._check_open()
                if self._socket not in ready and self._monitor in ready:
                    raise _lost(state) from None
                if not ready:
                    raise TransportError(f"bytes: {state} when its time was up: the daemon is busy or gone") from None

    def _skip(self) -> None:
        """Drop the rest of the current message."""
        socket = self._socket
        assert socket is not None
        while socket.get(zmq.RCVMORE):
            socket.recv(copy=False)

    def _acknowledge(self) -> None:
        self._taken += 1
        self._tell(Header(Kind.TAKEN, total=self._taken))

    def _refuse(self, transfer: int) -> None:
        """Have no more sent of a transfer: it belongs to a fetch that was given up."""
        self._unwanted = transfer
        self._tell(Header(Kind.CANCEL, transfer=transfer))

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the bytes client is closed")
        if self._cancelled:
            raise cancelled("bytes")

    def _tell(self, header: Header) -> None:
        if self._socket is not None:
            with contextlib.suppress(zmq.Again):  # the connection is lost; the deadline will say so
                self._socket.send(header.pack(), zmq.NOBLOCK)

    def __repr__(self) -> str:
        return f"BytesClient({'attached' if self._offer else 'not attached'})"


def _lost(state: str) -> TransportError:
    return TransportError(f"bytes: {state} when the connection to the daemon was lost", lost=True)
