"""A stand-in for `memory.cuda` on machines without a GPU: device memory is a memory file, tensors are CPU's.

What it keeps of the real thing: memory of one process is opened by another through 64 bytes, outlives its exporter for
those who have it open, and can no longer be opened then; only whole registered pages are unregistered; devices have
numbers and identities. What it does not: kernels, streams, and that a process cannot open its own memory. And it
refuses every handle that it did not make, where a driver may take one and fault.

    fake_cuda.install(monkeypatch)                                      in a test
    python -c "import fake_cuda; fake_cuda.install(); …"                in a child process, for good
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from specd.errors import TransportError
from specd.memory import cuda
from specd.memory import device_arena as device
from specd.memory.arena import PAGE
from specd.protocol.cut import Piece

DEVICES = 2
HANDLE_BYTES = 64
PATH_BYTES = HANDLE_BYTES - 8
"""The rest of a handle is the checksum of its path."""
registered: dict[int, int] = {}
"""Bytes of the host memory that is page-locked, by address."""
live: set[Allocation] = set()
"""Allocations that were not freed."""


def install(monkeypatch: pytest.MonkeyPatch | None = None, *, cupy: bool = True) -> None:
    """Replace `memory.cuda`, until the test ends or for good. cupy: whether it pretends that cupy is installed."""
    registered.clear()
    live.clear()
    replace: Any = setattr if monkeypatch is None else partial(monkeypatch.setattr, raising=False)
    for stand_in in (Allocation, Mapping, resolve, ordinal, uuid, visible, can_read, borrow, register, unregister):
        replace(cuda, stand_in.__name__, stand_in)
    replace(cuda, "runtime", runtime if cupy else _no_runtime)
    replace(device, "private_memory", private_memory)


def resolve(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def ordinal(device: str) -> int:
    kind, _, index = resolve(device).partition(":")
    if kind != "cuda" or not index.isdecimal():
        raise TransportError(f"device {device} has no CUDA memory: expected cuda:N")
    if int(index) >= DEVICES:
        raise TransportError(f"device {device} is not here: this process sees {DEVICES} CUDA devices")
    return int(index)


def uuid(device: str) -> str:
    return f"GPU-fake-{ordinal(device)}"


def visible() -> dict[str, str]:
    return {uuid(f"cuda:{index}"): f"cuda:{index}" for index in range(DEVICES)}


def can_read(device: str, other: str) -> bool:
    return all(ordinal(each) >= 0 for each in (device, other))


def runtime() -> Any:
    return SimpleNamespace(CUDARuntimeError=RuntimeError)


def _no_runtime() -> Any:
    raise TransportError("device memory is shared through cupy, which is not installed here")


def borrow(address: int, nbytes: int, device: str, owner: object = None) -> torch.Tensor:
    ordinal(device)
    view = (ctypes.c_uint8 * nbytes).from_address(address)
    view.owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(view, dtype=torch.uint8)


def register(address: int, nbytes: int, device: str) -> None:
    ordinal(device)
    assert address % PAGE == 0
    assert nbytes % PAGE == 0
    assert address not in registered, "registered twice"
    registered[address] = nbytes


def unregister(address: int, device: str) -> None:
    del registered[address]


def private_memory(nbytes: int, device: str) -> torch.Tensor:
    ordinal(device)
    memory = torch.empty(nbytes + PAGE, dtype=torch.uint8)
    return memory[-memory.data_ptr() % PAGE :][:nbytes].fill_(0xCD)


def _map(fd: int) -> tuple[mmap.mmap, int]:
    """A memory file, mapped, and its address."""
    mapping = mmap.mmap(fd, os.fstat(fd).st_size)
    return mapping, int(np.frombuffer(mapping, np.uint8).__array_interface__["data"][0])


class Allocation:
    """A memory file. Its tensors keep it mapped, unlike the real thing's."""

    def __init__(self, nbytes: int, device: str) -> None:
        cuda.runtime()
        ordinal(device)
        self.nbytes, self.device = nbytes, device
        self._fd = os.memfd_create("fake-cuda")
        os.truncate(self._fd, nbytes)
        self._mapping, self.address = _map(self._fd)
        self.tensor().fill_(0xCD)
        live.add(self)

    def handle(self) -> bytes:
        return signed(f"/proc/{os.getpid()}/fd/{self._fd}")

    def tensor(self) -> torch.Tensor:
        return borrow(self.address, self.nbytes, self.device, self._mapping)

    def free(self) -> None:
        if self.address:
            self.address = 0
            os.close(self._fd)
            live.discard(self)


def signed(path: str) -> bytes:
    """The handle of the memory file at `path`."""
    name = path.encode().ljust(PATH_BYTES, b"\0")
    assert len(name) == PATH_BYTES
    return name + xxhash.xxh3_64_digest(name)


class Mapping:
    """Another process's memory file. Raises TransportError for a handle that no Allocation made."""

    def __init__(self, handle: bytes, device: str) -> None:
        self.address = 0
        self.device = device
        if len(handle) != HANDLE_BYTES:
            raise TransportError(f"a memory handle of {len(handle)} bytes: expected {HANDLE_BYTES}")
        cuda.runtime()
        ordinal(device)
        name = handle[:PATH_BYTES]
        if xxhash.xxh3_64_digest(name) != handle[PATH_BYTES:]:
            raise TransportError("the driver refused: these bytes are no memory handle")
        try:
            fd = os.open(name.rstrip(b"\0"), os.O_RDWR)
        except OSError as error:
            raise TransportError(f"the driver does not find the daemon's process ({error.strerror})") from None
        try:
            self._mapping, self.address = _map(fd)
        finally:
            os.close(fd)

    def read(self, offset: int, nbytes: int, into: int, pieces: Sequence[Piece] = ()) -> None:
        assert self.address, "a copy from memory that is not mapped: the real thing faults"
        assert 0 <= offset <= offset + nbytes <= len(self._mapping)
        for piece in pieces or (Piece(0, 0, 1, nbytes, nbytes, nbytes),):
            for row in range(piece.rows):
                source = self.address + offset + piece.source + row * piece.pitch
                ctypes.memmove(into + piece.target + row * piece.step, source, piece.width)

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        assert 0 <= offset <= offset + nbytes <= len(self._mapping)
        return borrow(self.address + offset, nbytes, self.device, self._mapping)

    def close(self) -> None:
        self.address = 0
