"""The ceilings: plain copies by the same means as each transport's, without the transport."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from specd.bench.transport.timing import Mover
from specd.errors import TransportError
from specd.memory import cuda
from specd.transports.base import Traits

if TYPE_CHECKING:
    import torch

PEER_ACCESS_ENABLED: Final = 704
"""cudaErrorPeerAccessAlreadyEnabled."""


class Raw(Mover, Protocol):
    """A mover that holds memory. kind: what it does, for people."""

    kind: str

    def close(self) -> None:
        """Free it. Idempotent."""


class HostCopy:
    """`copy_` between warm buffers in host memory, on one thread; `count` pairs of buffers in turn."""

    kind = "host copy"

    def __init__(self, nbytes: int, count: int) -> None:
        import torch

        self._pairs = [
            (torch.zeros(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)) for _ in range(count)
        ]

    def one(self, nbytes: int) -> float:
        into, source = self._pairs[0]
        begin = time.perf_counter()
        into[:nbytes].copy_(source[:nbytes])
        return time.perf_counter() - begin

    def stream(self, nbytes: int, count: int) -> float:
        begin = time.perf_counter()
        for index in range(count):
            into, source = self._pairs[index % len(self._pairs)]
            into[:nbytes].copy_(source[:nbytes])
        return time.perf_counter() - begin

    def close(self) -> None:
        self._pairs = []


class DeviceCopy:
    """cudaMemcpyAsync on a stream of its own, and a host wait for that stream; a stream of copies is waited for once.

    source, target: `cpu` is page-locked memory; devices' memory is allocated like a ring's. count: pairs of buffers.
    Raises TransportError without cupy or memory.
    """

    def __init__(self, source: str, target: str, nbytes: int, count: int) -> None:
        self._cuda = cuda.runtime()
        self._held: list[cuda.Allocation | torch.Tensor] = []
        self.kind = _kind(source, target)
        self._device = target if target != "cpu" else source
        self._stream = 0
        try:
            with self._current():
                self._stream = int(self._cuda.streamCreateWithFlags(cuda.STREAM_NON_BLOCKING))
                if "cpu" not in (source, target) and source != target:
                    self._enable_peer(source, target)
            self._pairs = [(self._memory(target, nbytes), self._memory(source, nbytes)) for _ in range(count)]
        except BaseException:
            self.close()
            raise

    def one(self, nbytes: int) -> float:
        return self.stream(nbytes, 1)

    def stream(self, nbytes: int, count: int) -> float:
        with self._current():
            begin = time.perf_counter()
            for index in range(count):
                into, source = self._pairs[index % len(self._pairs)]
                self._cuda.memcpyAsync(into, source, nbytes, cuda.MEMCPY_DEFAULT, self._stream)
            self._cuda.streamSynchronize(self._stream)
            return time.perf_counter() - begin

    def close(self) -> None:
        self._pairs = []
        stream, self._stream = self._stream, 0
        if stream:
            with self._current():
                self._cuda.streamDestroy(stream)
        for memory in self._held:
            if isinstance(memory, cuda.Allocation):
                memory.free()
        self._held = []

    def _memory(self, device: str, nbytes: int) -> int:
        """The address of fresh memory on a device, kept until `close`."""
        import torch

        if device == "cpu":
            pinned = torch.zeros(nbytes, dtype=torch.uint8).pin_memory()
            self._held.append(pinned)
            return pinned.data_ptr()
        allocation = cuda.Allocation(nbytes, device)
        self._held.append(allocation)
        return allocation.address

    @contextlib.contextmanager
    def _current(self) -> Iterator[None]:
        """Make the device that copies this thread's own, for torch's CUDA runtime and for cupy's."""
        import torch

        with torch.cuda.device(self._device):
            self._cuda.setDevice(cuda.ordinal(self._device))
            yield

    def _enable_peer(self, source: str, target: str) -> None:
        """Let the target's engine read the source directly; without it a copy between GPUs goes through the host."""
        if self._cuda.deviceCanAccessPeer(cuda.ordinal(target), cuda.ordinal(source)):
            try:
                self._cuda.deviceEnablePeerAccess(cuda.ordinal(source))
            except self._cuda.CUDARuntimeError as error:
                if error.status != PEER_ACCESS_ENABLED:
                    raise


class MirrorCopy:
    """The daemon's hop of a staged transport: a sealed slot copied to its mirror, page-locked shared host memory."""

    kind = "ring D2H"

    def __init__(self, device: str, nbytes: int) -> None:
        from specd.memory.device_arena import DeviceArena

        self._arena = DeviceArena.create(1, nbytes, device, secrets.token_hex(16), mirrored=True)
        self._generation = 0
        try:
            self._arena.read_on_host(b"bench", True)
        except BaseException:
            self._arena.close()
            raise

    def one(self, nbytes: int) -> float:
        self._generation += 1
        self._arena.begin(0)
        begin = time.perf_counter()
        self._arena.seal(0, self._generation, nbytes)
        return time.perf_counter() - begin

    def stream(self, nbytes: int, count: int) -> float:
        return sum(self.one(nbytes) for _ in range(count))

    def close(self) -> None:
        self._arena.close()


class Shelf:
    """The raw copies of a placement, made when first asked for and shared by its lanes; so are the reasons why not."""

    def __init__(self, daemon: str, trainer: str, nbytes: int, count: int) -> None:
        self._daemon = daemon
        self._trainer = trainer
        self._nbytes = nbytes
        self._count = count
        self.ring = count, nbytes
        self._made: dict[str, Raw | TransportError] = {}

    def for_transport(self, traits: Traits) -> Raw:
        """What such a transport is held against. Raises TransportError when it cannot be made."""
        if self._daemon == "cpu":
            return self._get("host", lambda: HostCopy(self._nbytes, self._count))
        if two_sided(traits):
            from specd.bench.transport.raw_nccl import NcclLoop

            return self._get("nccl", lambda: NcclLoop(self._daemon, self._trainer, self._nbytes, self._count))
        if "device" in traits.memory:
            return self._get("device", lambda: DeviceCopy(self._daemon, self._trainer, self._nbytes, self._count))
        return self._get("h2d", lambda: DeviceCopy("cpu", self._trainer, self._nbytes, 1))

    def to_host(self) -> Raw:
        """What the daemon's hop of a staged transport is held against."""
        return self._get("d2h", lambda: DeviceCopy(self._daemon, "cpu", self._nbytes, 1))

    def staging(self) -> Raw:
        """That hop itself."""
        return self._get("staging", lambda: MirrorCopy(self._daemon, self._nbytes))

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for raw in self._made.values():
                if not isinstance(raw, TransportError):
                    stack.callback(raw.close)
        self._made.clear()

    def _get(self, key: str, make: Callable[[], Raw]) -> Raw:
        if key not in self._made:
            try:
                self._made[key] = make()
            except TransportError as error:
                self._made[key] = error
        found = self._made[key]
        if isinstance(found, TransportError):
            raise found
        return found


def two_sided(traits: Traits) -> bool:
    """Whether both GPUs take part in a transfer: then its ceiling is NCCL's own send and receive, not a copy."""
    return "device" in traits.memory and not traits.one_sided


def _kind(source: str, target: str) -> str:
    if source == "cpu":
        return "pinned H2D"
    if target == "cpu":
        return "pinned D2H"
    return "device copy" if source == target else "peer copy"
