"""CUDA as specd needs it beside a model's kernels: devices by identity, memory others can open, copies off the stream.

Memory comes from cupy's plain cudaMalloc: what torch allocates may lie in expandable segments, which cannot be
exported. Nothing here is imported or probed before it is used, and no call leaves another device current on the
calling thread than it found.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from specd.errors import ConfigError, TransportError, pip_install
from specd.memory import rows
from specd.protocol.cut import Piece

if TYPE_CHECKING:
    import torch

HANDLE_BYTES = 64
"""CUDA_IPC_HANDLE_SIZE."""
BLOCK_BYTES = 2 << 20
"""The driver shares whole blocks of this size: a smaller allocation is exported together with its neighbours."""
LAZY_PEER_ACCESS = 1
"""cudaIpcMemLazyEnablePeerAccess, the only flag cudaIpcOpenMemHandle takes."""
MEMCPY_DEFAULT = 4
"""cudaMemcpyDefault: the driver tells from the addresses which way to copy."""
STREAM_NON_BLOCKING = 1
"""cudaStreamNonBlocking: it does not wait for the legacy default stream, where models run."""


def resolve(device: str) -> str:
    """`cuda` as the ordinal that is current on the calling thread, `cuda:1`; any other device unchanged.

    Threads start on device 0 whatever their parent chose, so a device is resolved once, where it was named.
    Raises ConfigError where torch has no CUDA device.
    """
    if device != "cuda":
        return device
    import torch

    if not torch.cuda.device_count():
        raise ConfigError("device 'cuda': torch sees no CUDA device here; use auto or cpu, or see `specd doctor`")
    return f"cuda:{torch.cuda.current_device()}"


def ordinal(device: str) -> int:
    """The index of `cuda:1` in this process. Raises TransportError when it is no CUDA device, or not here."""
    import torch

    kind, _, index = resolve(device).partition(":")
    if kind != "cuda" or not index.isdecimal():
        raise TransportError(f"device {device} has no CUDA memory: expected cuda:N")
    if (found := torch.cuda.device_count()) <= (number := int(index)):
        raise TransportError(f"device {device} is not here: this process sees {found} CUDA devices")
    return number


def uuid(device: str) -> str:
    """`GPU-…`, the identity of a device: the same in every process, whatever CUDA_VISIBLE_DEVICES says."""
    import torch

    found = str(torch.cuda.get_device_properties(ordinal(device)).uuid)
    return found if found.startswith(("GPU-", "MIG-")) else f"GPU-{found}"


def visible() -> dict[str, str]:
    """The devices this process sees: `cuda:0` and so on, by `uuid`."""
    import torch

    return {uuid(f"cuda:{index}"): f"cuda:{index}" for index in range(torch.cuda.device_count())}


def can_read(device: str, other: str) -> bool:
    """Whether the driver says that `device` can address the memory of `other`; both are of this process."""
    import torch

    here, there = ordinal(device), ordinal(other)
    return here == there or bool(torch.cuda.can_device_access_peer(here, there))


def runtime() -> Any:
    """cupy's CUDA runtime. Raises TransportError when cupy is not installed or does not fit the driver."""
    try:
        from cupy.cuda import runtime as found
    except ImportError as error:
        lines = [line.strip(" =") for line in str(error).splitlines()]  # cupy adds a page of advice, the reason is last
        why = next((line for line in reversed(lines) if line), type(error).__name__)
        raise TransportError(
            f"device memory is shared through cupy, which cannot be imported ({why}): install it with: "
            f"{pip_install('cuda13')}, or with cuda12 for a CUDA 12 torch"
        ) from None
    return found


class Allocation:
    """Device memory of its own cudaMalloc, outside torch's allocator, so that other processes can open it.

    device: such as `cuda:0`. address: on it. Raises TransportError without cupy or without enough memory.
    """

    __slots__ = ("_runtime", "address", "device", "nbytes")

    def __init__(self, nbytes: int, device: str) -> None:
        self._runtime = runtime()
        self.device = device
        self.nbytes = nbytes
        self.address = 0
        with _current(device):
            try:
                self.address = int(self._runtime.malloc(-(-nbytes // BLOCK_BYTES) * BLOCK_BYTES))
            except self._runtime.CUDARuntimeError as error:
                raise TransportError(
                    f"cannot reserve {nbytes / 2**20:.0f} MiB on {device}: {error}; configure fewer or shorter slots "
                    f"(ring.slots, ring.slot_tokens)"
                ) from None

    def handle(self) -> bytes:
        """What `Mapping` opens in another process of this host, HANDLE_BYTES long."""
        with _current(self.device):
            try:
                return bytes(self._runtime.ipcGetMemHandle(self.address))
            except self._runtime.CUDARuntimeError as error:
                raise TransportError(f"the driver does not export memory of {self.device}: {error}") from None

    def tensor(self) -> torch.Tensor:
        """The memory as uint8 [nbytes], without a copy; it does not keep the memory alive."""
        return borrow(self.address, self.nbytes, self.device)

    def free(self) -> None:
        """Give the memory back; it must no longer be in use. Idempotent."""
        address, self.address = self.address, 0
        if address:
            with _current(self.device):
                self._runtime.free(address)

    def __repr__(self) -> str:
        return f"Allocation({self.nbytes} bytes on {self.device})"


class _Opened:
    """An opened handle; it is closed with the last that holds it: its Mapping, or a tensor that was lent."""

    __slots__ = ("_runtime", "address", "device", "lent")

    def __init__(self, handle: bytes, device: str) -> None:
        self.address = 0
        self.device = device
        self.lent = False
        self._runtime = runtime()
        with _current(device):
            try:
                self.address = int(self._runtime.ipcOpenMemHandle(handle, LAZY_PEER_ACCESS))
            except self._runtime.CUDARuntimeError as error:
                raise TransportError(f"{_why_not_opened(error)} ({error})") from None

    def __del__(self) -> None:
        if not self.address or sys.is_finalizing():
            return
        with _current(self.device), contextlib.suppress(self._runtime.CUDARuntimeError):
            if self.lent:  # kernels that read it may still run
                self._runtime.deviceSynchronize()
            self._runtime.ipcCloseMemHandle(self.address)


class Mapping:
    """Another process's Allocation, opened to be read by `device`, a device of this process; one thread at a time.

    A process cannot open its own. Raises TransportError when the driver refuses.
    """

    __slots__ = ("_address", "_index", "_opened", "_runtime", "_stream", "device")

    def __init__(self, handle: bytes, device: str) -> None:
        if len(handle) != HANDLE_BYTES:
            raise TransportError(f"a memory handle of {len(handle)} bytes: expected {HANDLE_BYTES}")
        self._runtime = runtime()
        self._index = ordinal(device)
        self.device = device
        self._opened: _Opened | None = _Opened(handle, device)
        self._address = self._opened.address
        with _current(device):
            # Of its own: torch's come from a pool of 32 and are shared once more were asked for.
            try:
                self._stream = int(self._runtime.streamCreateWithFlags(STREAM_NON_BLOCKING))
            except self._runtime.CUDARuntimeError as error:
                raise TransportError(f"{device} gives no stream to copy on: {error}") from None

    def read(self, offset: int, nbytes: int, into: int, pieces: tuple[Piece, ...] = ()) -> None:
        """Copy `nbytes` bytes at `offset` to the address `into`; on return they are there, for any stream.

        With pieces, these of what lies at `offset`, which make `nbytes` bytes with what is between them.
        It waits for nothing but its copy: no kernel may still be using `into`. Raises TransportError, as lost, when the
        driver or the device reports a fault.
        """
        assert self._opened is not None
        cuda, stream = self._runtime, self._stream
        source = self._address + offset
        try:
            # On a thread that has no device yet, the calls would open device 0.
            with contextlib.nullcontext() if cuda.getDevice() == self._index else _current(self.device):
                if not pieces:
                    cuda.memcpyAsync(into, source, nbytes, MEMCPY_DEFAULT, stream)
                else:
                    for piece in rows.queue(source, into, pieces, self._index, stream):
                        there, here = source + piece.source, into + piece.target
                        size = piece.width, piece.rows
                        cuda.memcpy2DAsync(here, piece.step, there, piece.pitch, *size, MEMCPY_DEFAULT, stream)
            cuda.streamSynchronize(stream)
        except RuntimeError as error:  # cupy's, of CUDA's runtime or of the driver
            with contextlib.suppress(RuntimeError):  # what was queued before it still writes
                cuda.streamSynchronize(stream)
            raise TransportError(f"the copy to {self.device} failed: {error}", lost=True) from None

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Part of the memory in place, uint8 [nbytes]; it stays mapped as long as the tensor lives."""
        assert self._opened is not None
        self._opened.lent = True
        return borrow(self._address + offset, nbytes, self.device, owner=self._opened)

    def close(self) -> None:
        """Unmap it, as soon as none of its tensors is left. Idempotent."""
        if self._opened is not None:
            self._opened = None
            with _current(self.device), contextlib.suppress(self._runtime.CUDARuntimeError):
                self._runtime.streamDestroy(self._stream)

    def __repr__(self) -> str:
        return f"Mapping(on {self.device}{'' if self._opened else ', closed'})"


class Copier:
    """Copies on streams of its own, so that they never queue behind a model's kernels. One thread at a time.

    It waits for nothing but its copy: the source must be complete, and no kernel may still be using the destination.
    """

    __slots__ = ("_streams",)

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between any two devices; on return the bytes are there, for any stream."""
        self.copies([(into, source)])

    def copies(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy into the first of each pair from the second, all of them between the same two devices."""
        pairs = list(pairs)
        with self.on(*{tensor.device for pair in pairs for tensor in pair}):
            for into, source in pairs:
                into.copy_(source, non_blocking=True)

    @contextlib.contextmanager
    def on(self, *devices: torch.device) -> Iterator[None]:
        """What is launched inside runs on its streams of these devices, and is complete on leaving, for any stream."""
        import torch

        streams = [self._stream(device) for device in devices if device.type == "cuda"]
        with contextlib.ExitStack() as stack:
            if streams:  # a stream's context restores the device before it, even one that was never opened
                stack.enter_context(torch.cuda.device(streams[0].device))
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield
        for stream in streams:
            stream.synchronize()

    def _stream(self, device: torch.device) -> Any:
        import torch

        if device not in self._streams:
            stream: Any = torch.cuda.Stream  # untyped
            self._streams[device] = stream(device)
        return self._streams[device]


def borrow(address: int, nbytes: int, device: str, owner: object = None) -> torch.Tensor:
    """Device memory as a tensor, uint8 [nbytes], without a copy. owner: kept alive as long as the tensor."""
    import cupy
    from torch.utils.dlpack import from_dlpack

    with _current(device):
        memory = cupy.cuda.UnownedMemory(address, nbytes, owner, ordinal(device))
        return from_dlpack(cupy.ndarray((nbytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0)))


def register(address: int, nbytes: int, device: str) -> None:
    """Page-lock host memory that is mapped writable, whole pages, so that copies to and from it are asynchronous.

    Raises TransportError when the driver refuses.
    """
    import torch

    cudart: Any = torch.cuda.cudart  # untyped
    with torch.cuda.device(ordinal(device)):
        code = int(cudart().cudaHostRegister(address, nbytes, 0))
        if code:
            # The runtime keeps the error for its next caller; a kernel of our own takes it.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device)
            raise TransportError(f"the driver does not page-lock {nbytes} bytes of host memory: CUDA error {code}")


def unregister(address: int, device: str) -> None:
    """Undo `register`, before the memory is unmapped and with no copy in flight."""
    import torch

    cudart: Any = torch.cuda.cudart  # untyped
    with torch.cuda.device(ordinal(device)):
        cudart().cudaHostUnregister(address)


@contextlib.contextmanager
def _current(device: str) -> Iterator[None]:
    """Make `device` current on this thread, for torch's CUDA runtime and for cupy's, which is a copy of its own.

    torch restores the current device without opening one that was never used.
    """
    import torch

    index = ordinal(device)
    with torch.cuda.device(index):
        runtime().setDevice(index)
        yield


def _why_not_opened(error: Exception) -> str:
    """The likely cause when cudaIpcOpenMemHandle refuses, in words."""
    text = str(error)
    if "PeerAccess" in text or "TooManyPeers" in text:
        return "the driver gives no peer access between the two GPUs"
    if "MapBufferObjectFailed" in text or "NotSupported" in text:
        return "the driver does not share memory between processes here"
    # How it says that it cannot tell whose handle that is.
    if any(name in text for name in ("DeviceUninitialized", "InvalidResourceHandle", "InvalidValue")):
        return (
            "the driver does not find the daemon's process: daemon and trainer must be two processes in the same PID "
            "and IPC namespace (docker run --pid=host --ipc=host)"
        )
    return "the driver refused"
