"""The arena: one allocation that holds every slot of the ring, shared with other processes or private.

A host arena is a header and the slots, in one mapping:

    offset 0    magic 8s · version u32 · epoch length u32 · num_slots u64 · slot_bytes u64 · epoch 32s   (little-endian)
    offset 64   one 64-byte line per slot: the generation of its bytes here u64, that of its bytes on a device u64, then
                zeros; a generation is 0 while those bytes are being written
    page-aligned: slot 0, slot 1, …, each rounded up to whole pages

The ring of a GPU target lies in a `device_arena.DeviceArena` and keeps its generations in a host arena, the ledger;
slot_bytes is 0 there unless its slots are mirrored to the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import stat
import struct
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol

import numpy as np

from specd.errors import TransportError
from specd.memory.segment import SHM_DIR, create_segment, is_segment_path, prefix, remove, segment_path

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

PAGE: Final = 4096
LINE: Final = 64
MAX_SLOTS: Final = 65536
_MAGIC: Final = b"specdmem"
_VERSION: Final = 2
_HEADER: Final = struct.Struct("<8sIIQQ32s")


class Span(NamedTuple):
    """A stretch of this process's memory."""

    address: int
    nbytes: int


class Arena(Protocol):
    """What a transport's server may know of the ring's memory, wherever it lies.

    memory, device: where the slots lie; device is `cpu` or such as `cuda:0`. num_slots, slot_bytes: geometry. stride:
    bytes from the start of one slot to that of the next, whole pages. path: the segment that another process of this
    host opens, empty if private: it holds the slots themselves, or the generations of slots on a device. ledger: the
    host arena with the generations; slots in host memory are in theirs.
    """

    @property
    def memory(self) -> Literal["host", "device"]: ...
    @property
    def device(self) -> str: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def ledger(self) -> HostArena: ...
    def tensor(self, slot: int) -> torch.Tensor:
        """One slot as uint8 [slot_bytes], without a copy, on the device it lies on."""
        ...

    def address(self, slot: int) -> int:
        """Where a slot begins: a pointer of this process, or of the device."""
        ...

    def generation(self, slot: int) -> int:
        """The generation whose bytes the slot holds; 0 while it is being written or before it was ever filled."""
        ...

    def word_address(self, slot: int) -> int:
        """Where that generation lies, u64, in host memory: for a copy that must see it at its own place on a stream."""
        ...

    def handle(self) -> bytes:
        """What another process of this host opens device memory by; slot i then begins at `i * stride`.

        Raises TransportError for memory that is not opened so.
        """
        ...


class HostArena:
    """Slots in host memory. Built by `create` (the worker) or `open` (a trainer); an `Arena`, and its own ledger.

    num_slots, slot_bytes: geometry; slot_bytes 0 for generations alone. path: the named segment, empty when private.
    mapping: all of it, page-aligned, for registration with a device driver. All views stay valid after `close`: the
    memory itself goes with the last of them.
    """

    __slots__ = (
        "__weakref__", "_fd", "_map", "_start", "_words", "mapping", "num_slots", "path", "slot_bytes", "stride",
        "writable",
    )  # fmt: skip

    def __init__(self, mapping: mmap.mmap, fd: int, num_slots: int, slot_bytes: int, path: str, writable: bool) -> None:
        self._map: mmap.mmap | None = mapping
        self._fd = fd
        self._start, self.stride = _geometry(num_slots, slot_bytes)
        self._words = memoryview(mapping)[: self._start].cast("Q")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.path = path
        self.writable = writable
        address = int(np.frombuffer(mapping, np.uint8).__array_interface__["data"][0])
        self.mapping = Span(address, len(mapping))

    @classmethod
    def create(cls, num_slots: int, slot_bytes: int, shared: str | None) -> HostArena:
        """The worker's arena. shared: the epoch in hex to name a segment other processes can open, None for private.

        A shared segment is fully backed by memory on return, so that it cannot fail later on first touch.
        Raises TransportError when there is not enough shared memory.
        """
        start, stride = _geometry(num_slots, slot_bytes)
        total = start + num_slots * stride
        if shared is None:
            fd, path = -1, ""
            try:
                mapping = mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise TransportError(
                    f"cannot reserve {total} bytes for {num_slots} slots of {slot_bytes} bytes: {error.strerror}; "
                    f"configure fewer or shorter slots"
                ) from None
            with contextlib.suppress(OSError):  # a hint, which kernels without huge pages refuse
                mapping.madvise(mmap.MADV_HUGEPAGE)
        else:
            path = segment_path(shared)
            fd = create_segment(path, total)
            try:
                mapping = mmap.mmap(fd, total, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            except OSError as error:
                os.unlink(path)
                os.close(fd)
                raise TransportError(f"cannot map {path}, {total} bytes: {error.strerror}") from None
        epoch = bytes.fromhex(shared or "")
        _HEADER.pack_into(mapping, 0, _MAGIC, _VERSION, len(epoch), num_slots, slot_bytes, epoch)
        return cls(mapping, fd, num_slots, slot_bytes, path, writable=True)

    @classmethod
    def open(
        cls, path: str, num_slots: int, slot_bytes: int, *, words_only: bool = False, writable: bool = False
    ) -> HostArena:
        """A trainer's view of a shared arena.

        words_only: map the generations and no slot. writable: map it so that a device driver can page-lock it, which
        a read-only mapping is refused; a trainer still writes nothing.
        Raises TransportError when the path is not a segment of this user or does not hold that arena.
        """
        start, stride = _geometry(num_slots, slot_bytes)
        total = start + num_slots * stride
        mapped = start if words_only else total
        if not is_segment_path(path):
            raise TransportError(f"{path!r} is not a segment of this user: expected {SHM_DIR}/{prefix()}EPOCH")
        try:
            fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(
                f"cannot open {path}: {error.strerror}; daemon and trainer must share {SHM_DIR} (same host, and the "
                f"same IPC namespace in containers)"
            ) from None
        try:
            facts = os.fstat(fd)
            mode = stat.S_IMODE(facts.st_mode)
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.getuid() or mode != 0o600:
                raise TransportError(
                    f"{path} belongs to uid {facts.st_uid} with mode {mode:o}: expected a file of uid {os.getuid()} "
                    f"with mode 600"
                )
            if facts.st_size != total:
                raise TransportError(f"{path} has {facts.st_size} bytes, expected {total}: it is not the daemon's ring")
            access = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
            mapping = mmap.mmap(fd, mapped, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=access)
        except OSError as error:
            raise TransportError(f"cannot map {path}, {mapped} bytes: {error.strerror}") from None
        finally:
            os.close(fd)
        magic, version, length, slots, nbytes, epoch = _HEADER.unpack_from(mapping)
        found = (magic, version, slots, nbytes, epoch[:length].hex())
        expected = (_MAGIC, _VERSION, num_slots, slot_bytes, path.rpartition("-")[2])
        if found != expected:
            raise TransportError(
                f"{path} holds (magic, version, slots, slot bytes, epoch) {found}, expected {expected}"
            )
        return cls(mapping, -1, num_slots, slot_bytes, path, writable=writable)

    @property
    def memory(self) -> Literal["host"]:
        return "host"

    @property
    def device(self) -> Literal["cpu"]:
        return "cpu"

    @property
    def ledger(self) -> HostArena:
        return self

    def slot(self, slot: int) -> memoryview:
        """One slot's bytes, [slot_bytes], page-aligned; read-only in a trainer.

        Raises TransportError where only generations are.
        """
        offset = self.address(slot) - self.mapping.address
        return memoryview(self._mapped())[offset : offset + self.slot_bytes]

    def tensor(self, slot: int) -> torch.Tensor:
        """One slot as uint8 [slot_bytes], without a copy. A trainer must not write to it: that faults."""
        import torch

        owner = self.slot(slot)
        # By address: torch warns of a read-only buffer, and numpy cannot hide that a mapping is one.
        view = (ctypes.c_uint8 * self.slot_bytes).from_address(self.address(slot))
        view.owner = owner  # type: ignore[attr-defined]  # the tensor keeps the view, the view the mapping
        return torch.frombuffer(view, dtype=torch.uint8)

    def address(self, slot: int) -> int:
        """Where a slot begins. Raises TransportError where only generations are."""
        offset = self._offset(slot)
        if offset + self.slot_bytes > self.mapping.nbytes or not self.slot_bytes:
            raise TransportError(f"{self!r} has generations alone: its slots' bytes are not mapped")
        return self.mapping.address + offset

    def handle(self) -> bytes:
        raise TransportError(f"{self!r} lies in host memory: another process opens it by its path")

    def begin(self, slot: int, *, device: bool = False) -> None:
        """Mark a slot as being written; a transfer that still reads it will notice.

        device: the bytes of this slot on the device, instead of those here; as in the next two.
        """
        self._words[self._word(slot, device)] = 0

    def write(self, slot: int, data: NDArray[np.uint8]) -> None:
        """Put bytes at the start of a slot, between `begin` and `seal`."""
        self.slot(slot)[: data.size] = data.data

    def seal(self, slot: int, generation: int, nbytes: int = 0, *, device: bool = False) -> None:
        """Mark a slot as holding `generation` (≥ 1), with a single aligned store. All its bytes must be written.

        nbytes: how many of them count, 0 for all; it matters only to a `DeviceArena`, which may have to copy them.
        """
        self._words[self._word(slot, device)] = generation

    def generation(self, slot: int, *, device: bool = False) -> int:
        """The generation whose bytes the slot holds; 0 while it is being written or before it was ever filled."""
        return self._words[self._word(slot, device)]

    def word_address(self, slot: int, *, device: bool = False) -> int:
        """See Arena."""
        return self.mapping.address + self._word(slot, device) * 8

    def close(self) -> None:
        """Unlink the segment if this is its creator, and let go of the memory. Idempotent."""
        mapping, self._map = self._map, None
        if mapping is None:
            return
        self._words.release()
        if self._fd >= 0:
            remove(self.path)
            # The mapping holds a duplicate of the descriptor, and with it the lock, until its last view is gone.
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1
        try:
            mapping.close()
        except BufferError:
            log.debug("views of %r are still in use: its memory goes with the last of them", self)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            raise TransportError(f"{self!r} is closed: its slots can no longer be used")
        return self._map

    def _word(self, slot: int, device: bool) -> int:
        """Index of a generation among the mapping's 64-bit words."""
        self._offset(slot)
        return (slot + 1) * LINE // 8 + device

    def _offset(self, slot: int) -> int:
        if not 0 <= slot < self.num_slots:
            raise TransportError(f"slot {slot} is out of range: the ring has {self.num_slots} slots")
        self._mapped()
        return self._start + slot * self.stride

    def __enter__(self) -> HostArena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._map is None else "writable" if self.writable else "read-only"
        return f"HostArena({self.num_slots} × {self.slot_bytes} bytes, {self.path or 'private'}, {state})"


def _geometry(num_slots: int, slot_bytes: int) -> tuple[int, int]:
    """(offset of slot 0, distance between slots), both in whole pages."""
    if not (1 <= num_slots <= MAX_SLOTS and 0 <= slot_bytes < 1 << 48):
        raise TransportError(
            f"{num_slots} slots of {slot_bytes} bytes: expected 1 to {MAX_SLOTS} slots of 0 to 2⁴⁸ bytes"
        )
    return -(-(LINE * (num_slots + 1)) // PAGE) * PAGE, -(-slot_bytes // PAGE) * PAGE
