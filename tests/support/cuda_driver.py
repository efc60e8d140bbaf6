"""A stand-in for cupy.cuda.runtime: a driver over host memory, and torch's device beside it."""

from __future__ import annotations

import ctypes
import threading
from types import ModuleType, SimpleNamespace

from specd.memory import cuda

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

    def stream(self, *, non_blocking: bool) -> SimpleNamespace:
        """cupy.cuda.Stream."""
        assert non_blocking
        self.note("Stream")
        return SimpleNamespace(ptr=77)

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
