"""A stand-in for cupy.cuda.runtime: a driver over host memory, and torch's device beside it."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

from specd.memory import cuda, rows
from specd.protocol.cut import Piece

HANDLE = b"h" * cuda.HANDLE_BYTES
SIZE = 4096


class CUDARuntimeError(RuntimeError):
    """As cupy's, whose text is `cudaErrorName: what it means`."""


class Driver(ModuleType):
    """Stands for cupy.cuda.runtime over host memory. calls: in order, with the device that was current."""

    CUDARuntimeError = CUDARuntimeError

    def __init__(self) -> None:
        super().__init__("cupy.cuda.runtime")
        self.exported = (ctypes.c_uint8 * SIZE)(*(i % 251 for i in range(SIZE)))
        self.calls: list[tuple[object, ...]] = []
        self.refusals: dict[str, str] = {}
        self.threads = threading.local()

    def note(self, name: str, *arguments: object) -> None:
        if name in self.refusals:
            raise CUDARuntimeError(self.refusals[name])
        self.calls.append((name, *arguments, self.getDevice()))

    def names(self) -> list[object]:
        return [call[0] for call in self.calls]

    def getDevice(self) -> int:
        return getattr(self.threads, "device", 0)

    def setDevice(self, device: int) -> None:
        self.threads.device = device

    def malloc(self, nbytes: int) -> int:
        self.note("malloc", nbytes)
        return ctypes.addressof(self.exported)

    def free(self, address: int) -> None:
        self.note("free", address)

    def ipcGetMemHandle(self, address: int) -> bytes:
        self.note("ipcGetMemHandle", address)
        return HANDLE

    def ipcOpenMemHandle(self, handle: bytes, flags: int) -> int:
        assert (handle, flags) == (HANDLE, 1)
        self.note("ipcOpenMemHandle")
        return ctypes.addressof(self.exported)

    def ipcCloseMemHandle(self, address: int) -> None:
        self.note("ipcCloseMemHandle", address)

    def deviceSynchronize(self) -> None:
        self.note("deviceSynchronize")

    def streamCreateWithFlags(self, flags: int) -> int:
        assert flags == 1
        self.note("streamCreateWithFlags")
        return 77

    def streamDestroy(self, stream: int) -> None:
        self.note("streamDestroy", stream)

    def memcpyAsync(self, into: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        assert kind == 4
        self.note("memcpyAsync", nbytes, stream)
        ctypes.memmove(into, source, nbytes)

    def memcpy2DAsync(
        self, into: int, step: int, source: int, pitch: int, width: int, rows: int, kind: int, stream: int
    ) -> None:
        assert kind == 4
        self.note("memcpy2DAsync", rows, stream)
        for row in range(rows):
            ctypes.memmove(into + row * step, source + row * pitch, width)

    def copy_rows(self, code: str, name: str, options: tuple[str, ...]) -> SimpleNamespace:
        """cupy.RawKernel of `memory.rows`, which copies on the host."""
        self.note("RawKernel", *options)

        def launch(
            blocks: Sequence[int], threads: Sequence[int], given: tuple[Any, ...], shared: int, stream: Any
        ) -> None:
            self.note("copy_rows", *blocks, stream.ptr)
            table, source, target = given
            assert table.size == 1, "what cupy passes by value"
            assert (name in code, shared) == (True, 0)
            assert 0 < threads[0] <= rows.THREADS
            assert threads[0] % 32 == 0
            count, size = blocks[1], rows.TABLE.size // rows.PIECES_A_LAUNCH
            for index in range(count):
                piece = Piece(*struct.unpack_from("6q", table.tobytes(), index * size))
                assert blocks[0] >= piece.rows
                for row in range(piece.rows):
                    there = source + rows.WORD * (piece.source + row * piece.pitch)
                    here = target + rows.WORD * (piece.target + row * piece.step)
                    ctypes.memmove(here, there, rows.WORD * piece.width)

        return SimpleNamespace(kernel=launch)

    def streamSynchronize(self, stream: int) -> None:
        self.note("streamSynchronize", stream)


class Device:
    """torch.cuda.device: makes a device current for a while."""

    def __init__(self, driver: Driver, index: int) -> None:
        self._driver, self._index = driver, index

    def __enter__(self) -> None:
        self._before = self._driver.getDevice()
        self._driver.setDevice(self._index)

    def __exit__(self, *_: object) -> None:
        self._driver.setDevice(self._before)
