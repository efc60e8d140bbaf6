"""`memory.cuda` against a driver that is not there: its calls, on which device, and what their refusals become.

What only hardware can tell is marked `gpu`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cuda_driver import HANDLE, SIZE, Device, Driver
from specd.errors import ConfigError, TransportError
from specd.memory import cuda, rows
from specd.protocol.cut import Piece, gather


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Two devices, and a cupy whose arrays are numpy's."""
    driver = Driver()

    def unowned(address: int, nbytes: int, owner: object, device: int) -> Any:
        memory = (ctypes.c_uint8 * nbytes).from_address(address)
        memory.owner = owner  # type: ignore[attr-defined]
        return memory

    namespace = ModuleType("cupy.cuda")
    vars(namespace).update(runtime=driver, UnownedMemory=unowned, MemoryPointer=lambda memory, offset: memory)
    cupy = ModuleType("cupy")
    vars(cupy).update(RawKernel=driver.copy_rows)
    vars(cupy).update(cuda=namespace, uint8=np.uint8, ndarray=lambda shape, dtype, memory: np.frombuffer(memory, dtype))
    for name, module in {"cupy": cupy, "cupy.cuda": namespace, "cupy.cuda.runtime": driver}.items():
        monkeypatch.setitem(sys.modules, name, module)
    properties = [SimpleNamespace(uuid=f"0{index}23-45") for index in range(2)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", driver.getDevice)
    monkeypatch.setattr(torch.cuda, "device", lambda index: Device(driver, index))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, peer: (device, peer) == (1, 0))
    rows._kernel.cache_clear()
    yield driver
    rows._kernel.cache_clear()
    assert driver.getDevice() == 0, "another device was left current"


def test_it_imports_without_torch_and_cupy() -> None:
    code = "import sys, specd.memory.cuda; assert not {'torch', 'cupy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_device_is_resolved_where_it_was_named(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.setDevice(1)
    assert cuda.resolve("cuda") == "cuda:1"
    assert cuda.ordinal("cuda") == 1
    driver.setDevice(0)
    assert cuda.resolve("cuda:1") == "cuda:1"
    assert cuda.resolve("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="device 'cuda': torch sees no CUDA device here; use auto or cpu"):
        cuda.resolve("cuda")


@pytest.mark.parametrize(
    ("device", "match"),
    [("cpu", "has no CUDA memory"), ("cuda:x", "expected cuda:N"), ("cuda:2", "this process sees 2 CUDA devices")],
)
def test_a_device_that_is_none_is_refused(driver: Driver, device: str, match: str) -> None:
    with pytest.raises(TransportError, match=match):
        cuda.ordinal(device)


def test_devices_are_known_by_their_uuid(driver: Driver) -> None:
    assert cuda.uuid("cuda:1") == "GPU-0123-45"
    assert cuda.visible() == {"GPU-0023-45": "cuda:0", "GPU-0123-45": "cuda:1"}
    assert cuda.can_read("cuda:1", "cuda:0")
    assert not cuda.can_read("cuda:0", "cuda:1")
    assert cuda.can_read("cuda:0", "cuda:0")


def test_without_cupy_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TransportError, match=r"cannot be imported \(import of cupy.* halted.*pip .*\[cuda13\]', or"):
        cuda.runtime()


def test_of_cupys_page_of_advice_the_reason_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> object:
            if name == "runtime":
                raise ImportError(
                    "\n====\nFailed to import CuPy.\n\nOriginal error:\n  ImportError: libcuda.so.1\n====\n"
                )
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", Broken("cupy.cuda"))
    with pytest.raises(TransportError, match=r"cannot be imported \(ImportError: libcuda.so.1\): install"):
        cuda.runtime()


def test_an_allocation_has_whole_blocks_of_its_device(driver: Driver) -> None:
    memory = cuda.Allocation(SIZE, "cuda:1")
    assert memory.handle() == HANDLE
    assert memory.tensor().tolist() == list(driver.exported)
    address = memory.address
    memory.free()
    memory.free()
    assert driver.calls == [("malloc", 2 << 20, 1), ("ipcGetMemHandle", address, 1), ("free", address, 1)]


def test_an_allocation_that_is_refused_says_what_to_do(driver: Driver) -> None:
    driver.refusals = {"malloc": "cudaErrorMemoryAllocation: out of memory"}
    with pytest.raises(TransportError, match=r"reserve 3 MiB on cuda:0: .*out of memory; configure fewer"):
        cuda.Allocation(3 << 20, "cuda:0")
    driver.refusals = {"ipcGetMemHandle": "cudaErrorNotSupported: operation not supported"}
    with pytest.raises(TransportError, match="does not export memory of cuda:0"):
        cuda.Allocation(SIZE, "cuda:0").handle()


def test_a_mapping_copies_on_a_stream_of_its_own_device(driver: Driver) -> None:
    mapping = cuda.Mapping(HANDLE, "cuda:1")
    into = (ctypes.c_uint8 * 100)()
    mapping.read(7, 100, ctypes.addressof(into))  # from a thread whose device is another one
    assert list(into) == list(driver.exported[7:107])
    driver.setDevice(1)
    mapping.read(0, 50, ctypes.addressof(into))
    driver.setDevice(0)
    assert list(into[:50]) == list(driver.exported[:50])
    mapping.close()
    mapping.close()
    address = ctypes.addressof(driver.exported)
    assert driver.calls == [
        ("ipcOpenMemHandle", 1), ("streamCreateWithFlags", 1),
        ("memcpyAsync", 100, 77, 1), ("streamSynchronize", 77, 0),
        ("memcpyAsync", 50, 77, 1), ("streamSynchronize", 77, 1),
        ("ipcCloseMemHandle", address, 1), ("streamDestroy", 77, 1),
    ]  # fmt: skip


def test_a_mapping_copies_pieces_and_waits_for_them_once(driver: Driver) -> None:
    mapping = cuda.Mapping(HANDLE, "cuda:1")
    into = (ctypes.c_uint8 * 30)()
    mapping.read(10, 30, ctypes.addressof(into), (Piece(2, 0, 5, 3, 8, 4), Piece(60, 20, 1, 10, 10, 10)))
    mapping.close()
    rows = [list(driver.exported[12 + 8 * row : 15 + 8 * row]) for row in range(5)]
    assert list(into) == [*[byte for row in rows for byte in (*row, 0)], *driver.exported[70:80]]
    assert driver.calls[2:-2] == [
        ("memcpy2DAsync", 5, 77, 1), ("memcpy2DAsync", 1, 77, 1), ("streamSynchronize", 77, 0),
    ]  # fmt: skip


@pytest.fixture
def aligned(driver: Driver) -> tuple[int, int, Any]:
    """An offset of the exported memory and an address that are multiples of a word, and what lies at that address."""
    memory = np.zeros(600, np.uint8)
    return -driver.malloc(0) % rows.WORD, memory.ctypes.data + -memory.ctypes.data % rows.WORD, memory


def test_pieces_of_whole_words_go_through_the_kernel_and_others_through_the_driver(
    driver: Driver, aligned: tuple[int, int, Any]
) -> None:
    offset, into, memory = aligned
    odd = Piece(480, 240, 3, 5, 32, 8)
    pieces = (Piece(16, 0, 5, 32, 64, 48), odd, Piece(400, 300, 1, 64, 64, 64), Piece(800, 384, 2, 16, 32, 16))
    mapping = cuda.Mapping(HANDLE, "cuda:1")
    driver.calls.clear()
    mapping.read(offset, 500, into, pieces)
    found = memory[into - memory.ctypes.data :][:500]
    exported = memoryview(driver.exported)[offset:]
    assert bytes(found) == bytes(gather(exported, pieces, 0, 500))
    assert [call[0] for call in driver.calls] == [
        "RawKernel", "copy_rows", "memcpy2DAsync", "memcpy2DAsync", "streamSynchronize",
    ]  # fmt: skip
    assert driver.calls[0][1:] == (f"-DPIECES={rows.PIECES_A_LAUNCH}", 1)
    assert driver.calls[1][1:] == (5, 2, 77, 1)
    mapping.close()


def test_a_launch_that_fails_loses_the_client(driver: Driver, aligned: tuple[int, int, Any]) -> None:
    offset, into, _ = aligned
    mapping = cuda.Mapping(HANDLE, "cuda:0")
    driver.refusals = {"copy_rows": "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"}
    with pytest.raises(TransportError, match="the copy to cuda:0 failed: CUDA_ERROR_ILLEGAL_ADDRESS") as failure:
        mapping.read(offset, 256, into, (Piece(0, 0, 4, 16, 32, 16),))
    assert failure.value.lost
    mapping.close()


def test_a_mapping_stays_as_long_as_a_view_of_it(driver: Driver) -> None:
    mapping = cuda.Mapping(HANDLE, "cuda:1")
    view = mapping.tensor(10, 20)[5:]
    mapping.close()
    gc.collect()
    assert "ipcCloseMemHandle" not in driver.names()
    assert view.tolist() == list(driver.exported[15:30])
    driver.calls.clear()
    del view
    gc.collect()
    address = ctypes.addressof(driver.exported)
    assert driver.calls == [("deviceSynchronize", 1), ("ipcCloseMemHandle", address, 1)]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("cudaErrorDeviceUninitialized: invalid device context", "same PID and IPC namespace"),
        ("cudaErrorInvalidResourceHandle: invalid resource handle", "same PID and IPC namespace"),
        ("cudaErrorInvalidValue: invalid argument", "same PID and IPC namespace"),
        ("cudaErrorPeerAccessUnsupported: peer access is not supported between these two devices", "no peer access"),
        ("cudaErrorTooManyPeers: peer mapping resources exhausted", "no peer access"),
        ("cudaErrorMapBufferObjectFailed: mapping of buffer object failed", "does not share memory between processes"),
        ("cudaErrorUnknown: unknown error", "the driver refused"),
    ],
)
def test_a_mapping_that_is_refused_says_what_is_missing(driver: Driver, text: str, match: str) -> None:
    driver.refusals = {"ipcOpenMemHandle": text}
    with pytest.raises(TransportError, match=match) as refused:
        cuda.Mapping(HANDLE, "cuda:0")
    assert text in str(refused.value)
    gc.collect()
    assert driver.calls == []


def test_a_mapping_without_a_stream_is_unmapped(driver: Driver) -> None:
    driver.refusals = {"streamCreateWithFlags": "cudaErrorMemoryAllocation: out of memory"}
    with pytest.raises(TransportError, match="no stream to copy on"):
        cuda.Mapping(HANDLE, "cuda:0")
    gc.collect()
    assert driver.names() == ["ipcOpenMemHandle", "ipcCloseMemHandle"]


@pytest.mark.parametrize("call", ["memcpyAsync", "streamSynchronize"])
def test_a_copy_that_fails_loses_the_client(driver: Driver, call: str) -> None:
    mapping = cuda.Mapping(HANDLE, "cuda:0")
    driver.refusals = {call: "cudaErrorIllegalAddress: an illegal memory access was encountered"}
    with pytest.raises(TransportError, match="the copy to cuda:0 failed: cudaErrorIllegalAddress") as failure:
        mapping.read(0, 1, ctypes.addressof(driver.exported))
    assert failure.value.lost
    mapping.close()


def test_a_handle_of_another_size_never_reaches_the_driver(driver: Driver) -> None:
    with pytest.raises(TransportError, match="63 bytes: expected 64"):
        cuda.Mapping(HANDLE[:-1], "cuda:0")
    assert driver.calls == []


def test_registration_is_undone_and_a_refusal_leaves_no_error_behind(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[object, ...]] = []
    codes = [0, 712]

    def register(address: int, nbytes: int, flags: int) -> int:
        calls.append(("register", address, nbytes, flags, driver.getDevice()))
        return codes.pop(0)

    def take_error(*_: object, device: str) -> None:
        calls.append(("kernel", device))
        raise RuntimeError("CUDA error: part or all of the requested memory range is already mapped")

    runtime = SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=lambda address: calls.append(("unregister", address, driver.getDevice())),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "zeros", take_error)
    cuda.register(4096, 8192, "cuda:1")
    cuda.unregister(4096, "cuda:1")
    with pytest.raises(TransportError, match="does not page-lock 8192 bytes of host memory: CUDA error 712"):
        cuda.register(4096, 8192, "cuda:1")
    attempt = ("register", 4096, 8192, 0, 1)
    assert calls == [attempt, ("unregister", 4096, 1), attempt, ("kernel", "cuda:1")]


def _keep_busy() -> Any:
    """Let the default stream spin for about a second; returns an event that completes afterwards."""
    torch.cuda.synchronize()
    spin: Any = torch.cuda._sleep  # private, as in torch's own tests: torch 2.9 to 2.13
    event: Any = torch.cuda.Event
    over = event()
    spin(2_000_000_000)
    over.record()
    return over


@contextlib.contextmanager
def _page_locked(nbytes: int) -> Iterator[torch.Tensor]:
    memory = mmap.mmap(-1, nbytes)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    cuda.register(tensor.data_ptr(), nbytes, "cuda:0")
    try:
        yield tensor
    finally:
        torch.cuda.synchronize()
        cuda.unregister(tensor.data_ptr(), "cuda:0")


@pytest.mark.gpu(1)
def test_copies_do_not_wait_for_the_default_stream() -> None:
    on_device = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda:0")
    copier = cuda.Copier()
    with _page_locked(1 << 20) as host:
        copier.copy(on_device, host)  # the first one creates the stream
        host.copy_(torch.arange(1 << 20).to(torch.uint8))
        over = _keep_busy()
        copier.copy(on_device, host)
        host.zero_()
        copier.copy(host, on_device)
        assert not over.query(), "the copies waited for the model's stream"
        assert torch.equal(host, torch.arange(1 << 20).to(torch.uint8))


@pytest.mark.gpu(1)
def test_copies_of_registered_memory_are_asynchronous() -> None:
    on_device = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda:0")
    with _page_locked(1 << 20) as host:
        over = _keep_busy()
        on_device.copy_(host, non_blocking=True)  # behind the spinning kernel, and back at once
        assert not over.query()


@pytest.mark.gpu(1)
def test_a_registration_that_is_refused_does_not_fail_the_next_kernel() -> None:
    with _page_locked(4096) as host:
        with pytest.raises(TransportError, match="does not page-lock"):
            cuda.register(host.data_ptr(), 4096, "cuda:0")
        assert torch.ones(3, device="cuda:0").sum().item() == 3


@pytest.mark.gpu(1)
def test_memory_of_its_own_is_seen_by_torch() -> None:
    memory = cuda.Allocation(5000, "cuda:0")
    view = memory.tensor()
    assert (view.data_ptr(), view.shape, str(view.device)) == (memory.address, (5000,), "cuda:0")
    view.fill_(7)
    assert view.cpu().eq(7).all()
    assert len(memory.handle()) == cuda.HANDLE_BYTES
    with pytest.raises(TransportError, match="two processes"):  # what a driver says of one's own handle
        cuda.Mapping(memory.handle(), "cuda:0")
    del view
    memory.free()


@pytest.mark.gpu(2)
def test_no_other_device_is_left_current() -> None:
    torch.cuda.set_device(0)
    memory = cuda.Allocation(SIZE, "cuda:1")
    assert str(memory.tensor().device) == "cuda:1"
    cuda.Copier().copy(memory.tensor(), torch.ones(SIZE, dtype=torch.uint8, device="cuda:0"))
    assert memory.tensor().sum().item() == SIZE
    memory.free()
    assert torch.cuda.current_device() == 0
