"""Artifacts of the target over the wire: files and tensors in chunks, over whatever session is up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from specd.client.handshake import Session
from specd.errors import DaemonError, ProtocolError
from specd.protocol.limits import ARTIFACT_CHUNK_BYTES
from specd.protocol.messages import Artifact, Fetch, Message

WINDOW = 8
"""Chunks that are asked for at once."""

Ask = Callable[[Callable[[bytes], list[Message]], Session | None], Session | None]


class ArtifactReader:
    """Reads artifacts for one subscriber.

    lock: notified when something arrives. ask: sends messages, given their epoch, over a session that is up unless the
    one asked already is still up, and returns the one asked; it raises what ends the run.
    """

    __slots__ = ("_ask", "_chunks", "_lock", "_timeout_s", "_wanted")

    def __init__(self, lock: threading.Condition, timeout_s: float, ask: Ask) -> None:
        self._lock = lock
        self._timeout_s = timeout_s
        self._ask = ask
        self._chunks: dict[int, bytes] = {}
        self._wanted: tuple[str, dict[int, int]] = ("", {})
        """The artifact that is read, and the length of each chunk that was asked for, by its offset."""

    def arrived(self, message: Artifact, endpoint: str) -> None:
        """A chunk is here; one that a lost session was asked for may come late. Called with the lock held.

        Raises ProtocolError for one that has not the bytes that were asked for.
        """
        name, lengths = self._wanted
        if message.name == name and message.offset in lengths:
            if (came := len(message.data)) != (length := lengths[message.offset]):
                raise ProtocolError(
                    f"{endpoint} sent {came} bytes of artifact {name!r} at {message.offset}, {length} were asked for"
                )
            self._chunks[message.offset] = message.data

    def read(self, name: str, nbytes: int) -> bytearray:
        """All bytes of one artifact. Raises DaemonError when a chunk does not come in time."""
        data = bytearray(nbytes)
        offsets = range(0, nbytes, ARTIFACT_CHUNK_BYTES)
        for first in range(0, len(offsets), WINDOW):
            window = offsets[first : first + WINDOW]
            lengths = {offset: min(ARTIFACT_CHUNK_BYTES, nbytes - offset) for offset in window}
            for offset, chunk in self._read(name, lengths).items():
                data[offset : offset + len(chunk)] = chunk
        return data

    def _read(self, name: str, lengths: dict[int, int]) -> dict[int, bytes]:
        def fetches(epoch: bytes) -> list[Message]:
            self._chunks.clear()
            return [Fetch(epoch=epoch, name=name, offset=offset, length=length) for offset, length in lengths.items()]

        limit, asked = time.monotonic() + self._timeout_s, None
        with self._lock:
            self._wanted = (name, lengths)
            while len(self._chunks) < len(lengths):
                if (left := limit - time.monotonic()) < 0:
                    raise DaemonError(f"artifact {name!r} did not come within {self._timeout_s:g} s")
                asked = self._ask(fetches, asked)
                self._lock.wait(min(0.5, left))
            found = dict(self._chunks)
            self._chunks.clear()
            return found
