"""Rows of a peer's slot, read with what lies between their pieces, and cut at home.

A READ of each row's own bytes would be thousands for a batch, at a few microseconds each; in that time a fast link
moves more than lies between them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from specd.memory import cuda
from specd.protocol.cut import Piece
from specd.transports.nixl.agent import Destinations, NixlAgent, Region
from specd.transports.pieces import pairs

if TYPE_CHECKING:
    import torch

MOST_BYTES: Final = 64 << 20
"""Most that is read at once, unless a single row is longer: it needs a buffer of its own here."""


class Cutter:
    """Brings pieces of slots. agent: connected. destinations: of that agent. device: where pieces go."""

    def __init__(self, agent: NixlAgent, destinations: Destinations, device: str) -> None:
        self._agent = agent
        self._destinations = destinations
        self._device = device
        self._buffer: torch.Tensor | None = None
        self._copier = cuda.Copier()

    def bring(
        self, pieces: Sequence[Piece], slot: Region, into: torch.Tensor, deadline_s: float, stop: threading.Event
    ) -> None:
        """Bring pieces of `slot`, a region of the peer's, to `into`, a contiguous uint8 vector, and wait for them.

        deadline_s, stop: of each READ, as in `NixlAgent.read`, whose errors it raises.
        """
        home = self._destinations.region(into)
        grids: dict[tuple[int, int], list[Piece]] = {}
        for piece in pieces:
            if piece.rows == 1:
                local, remote = home.part(piece.target, piece.width), slot.part(piece.source, piece.width)
                self._agent.read(local, remote, time.monotonic() + deadline_s, stop)
            else:
                grids.setdefault((piece.rows, piece.pitch), []).append(piece)
        for (rows, pitch), cuts in grids.items():
            begin = min(piece.source for piece in cuts)
            width = max(piece.source + piece.width for piece in cuts) - begin
            most = max(1, (MOST_BYTES - width) // pitch + 1)
            for first in range(0, rows, most):
                count = min(most, rows - first)
                remote = slot.part(begin + first * pitch, (count - 1) * pitch + width)
                buffer = self._room(remote.nbytes)
                local = self._destinations.region(buffer).part(0, remote.nbytes)
                self._agent.read(local, remote, time.monotonic() + deadline_s, stop)
                here = [_part(piece, begin, first, count) for piece in cuts]
                for destination, source in pairs(here, into, buffer):
                    self._copier.copy(destination, source)

    def _room(self, nbytes: int) -> torch.Tensor:
        """The buffer, uint8 [≥ nbytes]."""
        if self._buffer is None or self._buffer.numel() < nbytes:
            from specd.memory.streams import allocate

            self._buffer = allocate(max(nbytes, MOST_BYTES), self._device)
        return self._buffer


def _part(piece: Piece, begin: int, first: int, count: int) -> Piece:
    """`count` rows of a piece from `first` on, out of a buffer that holds those rows from byte `begin` of each."""
    target = piece.target + first * piece.step
    return piece._replace(source=piece.source - begin, target=target, rows=count)
