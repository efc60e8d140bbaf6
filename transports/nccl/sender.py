"""The sending end of one session over nccl, in the worker: a thread that sends what is published, in order."""

from __future__ import annotations

import ctypes
import logging
import queue
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from specd.errors import TransportError
from specd.memory import device_arena
from specd.transports.base import SlotRef
from specd.transports.nccl.communicator import START_S, Communicator, Library
from specd.transports.nccl.transfer import NOTE, WINDOW, WORD_BYTES, Transfer, Transfers
from specd.transports.nccl.watch import Watch, patience

if TYPE_CHECKING:
    import torch

    from specd.memory.arena import Arena

log = logging.getLogger(__name__)

CONNECT_S: Final = 20.0
"""How long a sender waits for its trainer to attach."""
SEND_S: Final = 30.0
"""How long the oldest transfer in flight may wait for its trainer to take it."""


class _Sent(NamedTuple):
    ref: SlotRef
    transfer: Transfer
    payload: torch.Tensor


class Sender:
    """One session's rank 0, on a thread of its own: connects, then sends what is published, in order.

    It sleeps while nothing is to be sent. A peer that fails it, or takes nothing for SEND_S, ends it.

    arena: in device memory. max_ctas: see Communicator. name: of the session, for messages.
    """

    def __init__(self, arena: Arena, library: Library, unique_id: bytes, max_ctas: int, name: str) -> None:
        self._arena = arena
        self._library = library
        self._unique_id = unique_id
        self._max_ctas = max_ctas
        self._name = name
        self._published: queue.SimpleQueue[SlotRef | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._end = ""
        self._words: list[torch.Tensor] = []
        self._scratch: torch.Tensor | None = None
        """Where states are cut out of slots, one after the other; as large as a slot, once it is needed."""
        self._thread = threading.Thread(target=self._run, name="specd-nccl", daemon=True)
        self._thread.start()

    def publish(self, ref: SlotRef) -> None:
        if self._end:
            raise TransportError(f"the nccl sender of {self._name} has ended: {self._end}")
        if self._published.qsize() >= (most := 2 * self._arena.num_slots):
            raise TransportError(f"{most} transfers wait for {self._name}, which does not take them")
        self._published.put(ref)

    def stop(self) -> None:
        """Abandon everything; returns at once."""
        self._stop.set()
        self._published.put(None)

    def join(self, seconds: float) -> bool:
        """Wait up to `seconds` for a stopped sender to end; whether it has."""
        self._thread.join(max(0.0, seconds))
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        transfers: Transfers | None = None
        in_flight: deque[_Sent] = deque()
        try:
            watch = Watch(CONNECT_S, self._stop)
            device, unique_id = self._arena.device, self._unique_id
            transfers = Transfers(Communicator(self._library, device, 0, unique_id, self._max_ctas, watch))
            self._words = [_word(self._arena, slot) for slot in range(self._arena.num_slots)]
            with transfers.current():
                self._serve(transfers, in_flight)
        except TransportError as error:
            self._end = str(error)
            if not self._stop.is_set():
                log.warning("the nccl sender of %s ends: %s", self._name, error)
        except Exception as error:
            self._end = repr(error)
            log.exception("the nccl sender of %s failed", self._name)
        finally:
            self._end = self._end or "it was dropped"
            if transfers is not None:
                transfers.abort(list(in_flight))

    def _serve(self, transfers: Transfers, in_flight: deque[_Sent]) -> None:
        since = 0.0
        while not self._stop.is_set():
            # Only the last payload is in flight: its note goes with the next one if that is here already, else alone.
            last = transfers.owing and len(in_flight) == 1
            pause = 0.0 if last else patience(time.monotonic() - since)
            if len(in_flight) == WINDOW:
                self._stop.wait(pause)
            elif published := self._next(pause if in_flight else None):
                since = since if in_flight else time.monotonic()
                self._send(transfers, published, in_flight)
            elif last:
                transfers.finish(Watch(START_S, self._stop))
            while in_flight and transfers.over(in_flight[0].transfer):
                in_flight.popleft()
                since = time.monotonic()
            if in_flight and time.monotonic() - since > SEND_S:
                raise TransportError(f"slot {in_flight[0].ref.slot} was not taken within {SEND_S:g} s")

    def _next(self, timeout: float | None) -> SlotRef | None:
        """The next published slot; None after the timeout, or when stopped."""
        try:
            return self._published.get(timeout=timeout)
        except queue.Empty:
            return None

    def _send(self, transfers: Transfers, ref: SlotRef, in_flight: deque[_Sent]) -> None:
        payload, transfer = self._payload(transfers, ref), Transfer()
        in_flight.append(_Sent(ref, transfer, payload))
        note = NOTE.pack(ref.slot, ref.generation, ref.nbytes, 0)
        # The word is 0 before a kernel of a refill is launched: read behind the payload, it tells of every one.
        transfers.send(transfer, payload, note, self._words[ref.slot], Watch(START_S, self._stop))

    def _payload(self, transfers: Transfers, ref: SlotRef) -> torch.Tensor:
        """The bytes that a transfer sends: a stretch of the slot, or the scratch, into which the stream then cuts them.

        Raises TransportError without memory for that.
        """
        slot = self._arena.tensor(ref.slot)
        if (begin := ref.begin) is not None:
            return slot[begin : begin + ref.nbytes]
        if self._scratch is None:
            # Of the stream that is current, and so free for others no earlier than that is past it.
            self._scratch = device_arena.private_memory(self._arena.slot_bytes, self._arena.device)
        payload = self._scratch[: ref.nbytes]
        transfers.gather(ref.pieces, payload, slot)
        return payload


def _word(arena: Arena, slot: int) -> torch.Tensor:
    """A slot's generation where it lies, uint8 [WORD_BYTES], page-locked host memory."""
    import torch

    word = (ctypes.c_uint8 * WORD_BYTES).from_address(arena.word_address(slot))
    return torch.frombuffer(word, dtype=torch.uint8)
