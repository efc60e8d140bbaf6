"""The worker with its ring on a device, over a stand-in for CUDA: what it serves, announces, and cleans up."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

import fake_cuda
from specd.daemon.supervisor import ThreadHandle
from specd.errors import TransportError
from specd.memory.arena import HostArena
from specd.memory.segment import remove, segment_path
from specd.transports.base import ServerContext, SlotRef
from specd.transports.checks import pattern
from specd.transports.registry import load
from specd.worker import worker
from specd.worker.messages import (
    Accept,
    Accepted,
    Drop,
    Filled,
    FillFailed,
    FillNoise,
    FillSlot,
    Publish,
    Refused,
    Started,
    Stop,
)
from workers import Control, Known, SlowTarget, expected, only_these

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def device_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    fake_cuda.install(monkeypatch)
    yield
    assert not fake_cuda.registered, "page-locked memory was unmapped"


Run = Callable[..., tuple[Control, ThreadHandle]]


@pytest.fixture
def run() -> Iterator[Run]:
    """Start workers on threads; each is stopped in order, and must have cleaned up."""
    with zmq.Context() as context, contextlib.ExitStack() as stack:

        def start(device: str, *transports: str, **settings: Any) -> tuple[Control, ThreadHandle]:
            control = Control(context, f"inproc://{secrets.token_hex(4)}", device, *transports, **settings)
            handle = ThreadHandle(control.worker, context)

            def end() -> None:
                with contextlib.suppress(zmq.Again):  # it died, as the test wanted
                    control.send(Stop())
                assert handle.wait(30)
                control.close()
                os.close(handle.fd)
                assert not os.path.exists(segment_path(control.epoch.hex()))

            stack.callback(end)
            return control, handle

        yield start


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    return only_these(monkeypatch)


def test_another_attach_drops_the_session_from_the_earlier_transport(known: Known, run: Run) -> None:
    control, _ = run("cpu", "shm", "bytes")
    control.hear()
    for name in ("shm", "bytes"):
        for served in known.values():
            served.dropped.clear()
        control.send(Accept(session=b"s" * 16, transport=name, hello=b""))
        assert isinstance(control.hear(), Accepted)
    assert known["shm"].dropped == [b"s" * 16]
    assert known["bytes"].dropped == []


def test_slots_are_filled_on_the_device_and_mirrored_for_host_readers(known: Known, run: Run) -> None:
    control, _ = run("cuda:1", "auto")
    started = control.hear()
    ring, near, far = started.ring, b"n" * 16, b"f" * 16
    device = known["cuda_ipc"].arena
    with HostArena.open(started.segment, ring.num_slots, ring.slot_bytes) as host:

        def on_host(slot: int, task: FillSlot) -> bytes:
            return bytes(host.slot(slot)[: task.layout.nbytes])

        first = control.fill(0, 1, 40)
        control.filled(0, 1)
        assert device.tensor(0)[: first.layout.nbytes].numpy().tobytes() == expected(first)
        assert (host.generation(0), host.generation(0, device=True)) == (0, 1)
        control.send(Accept(session=near, transport="cuda_ipc", hello=b""))
        assert isinstance(control.hear(), Accepted)
        assert host.generation(0) == 0, "no session reads there"
        control.send(Accept(session=far, transport="shm", hello=b""))
        assert isinstance(control.hear(), Accepted)
        assert host.generation(0) == 1, "it was in the ring when the session came"
        assert on_host(0, first) == expected(first)
        second = control.fill(1, 2, 64)
        control.filled(1, 2)
        assert (host.generation(1), host.generation(1, device=True)) == (2, 2)
        assert on_host(1, second) == expected(second)
        nonce = secrets.token_bytes(16)
        control.send(FillNoise(slot=2, generation=3, nonce=nonce, nbytes=1000))
        control.filled(2, 3)
        assert bytes(host.slot(2)[:1000]) == device.tensor(2)[:1000].numpy().tobytes() == pattern(nonce, 1000).tobytes()
        control.send(Drop(session=far))
        control.fill(0, 4, 8)
        control.filled(0, 4)
        assert (host.generation(0), host.generation(0, device=True)) == (0, 4)
        control.send(Accept(session=near, transport="bytes", hello=b"not a hello"))
        assert isinstance(control.hear(), Refused)
        control.fill(0, 5, 8)
        control.filled(0, 5)
        assert host.generation(0) == 0, "a session that was refused reads nothing"


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_what_another_batch_left_between_two_tensors_is_gone(device: str, known: Known, run: Run) -> None:
    control, _ = run(device, "shm")
    ring = control.hear().ring
    arena = known["shm"].arena
    control.send(FillNoise(slot=0, generation=1, nonce=b"n" * 16, nbytes=ring.slot_bytes))
    control.filled(0, 1)
    control.send(Accept(session=b"s" * 16, transport="shm", hello=b""))
    assert isinstance(control.hear(), Accepted)
    task = control.fill(0, 2, 41)
    taps, final = task.layout.tensors
    assert taps.nbytes < final.offset
    control.filled(0, 2)
    assert arena.tensor(0)[: task.layout.nbytes].numpy().tobytes() == expected(task)


def test_two_workers_share_a_process(run: Run) -> None:
    ones = [run("cuda:0", "inproc")[0], run("cuda:1", "inproc")[0]]
    for one in ones:
        started = one.hear()
        assert (started.transports, started.segment) == (("inproc",), "")
    assert not fake_cuda.live, "a private ring is torch's"
    for generation in (1, 2):
        for one in ones:
            one.fill(generation, generation, 20)
        for one in ones:
            one.filled(generation, generation)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowTarget:
    target = SlowTarget()
    monkeypatch.setattr(worker, "load_target", lambda config: target)
    return target


def test_a_slot_is_announced_when_its_bytes_are_in_place_and_the_next_forward_does_not_wait(
    known: Known, slow: SlowTarget, run: Run
) -> None:
    control, _ = run("cuda:0", "cuda_ipc", "bytes")
    control.hear()
    arena = known["cuda_ipc"].arena
    control.send(Accept(session=b"s" * 16, transport="bytes", hello=b""))
    assert isinstance(control.hear(), Accepted)
    for slot in range(2):
        control.fill(slot, slot + 1, 16)
        assert slow.began.acquire(timeout=30), "the forward waited for the one before it"
    assert [arena.generation(slot) for slot in range(2)] == [0, 0]
    assert control.hears.poll(0) == 0
    slow.pending[0].done.set()
    control.filled(0, 1)
    assert [arena.generation(slot) for slot in range(2)] == [1, 0]
    assert [arena.ledger.generation(slot) for slot in range(2)] == [1, 0]
    slow.pending[1].done.set()
    control.filled(1, 2)
    control.fill(2, 3, 13)
    failed = control.hear()
    assert isinstance(failed, FillFailed)
    assert (failed.slot, failed.reason, arena.generation(2)) == (2, "thirteen tokens", 0)


def test_batches_queued_behind_two_forwards_share_the_next(known: Known, slow: SlowTarget, run: Run) -> None:
    control, _ = run("cuda:0", "cuda_ipc", exact=False, slots=6)
    control.hear()
    for slot in range(2):
        control.fill(slot, 1, 16)
        assert slow.began.acquire(timeout=30)
    for slot in range(2, 5):
        control.fill(slot, 1, 16 + slot)
        assert not slow.began.acquire(timeout=0.1)
    slow.pending[0].done.set()
    assert slow.began.acquire(timeout=30)
    assert slow.sizes == [[16], [16], [18, 19, 20]]
    slow.pending[1].done.set()
    slow.pending[2].done.set()
    for slot in range(5):
        control.filled(slot, 1)


def test_a_queued_forward_is_not_charged_for_its_wait(known: Known, slow: SlowTarget, run: Run) -> None:
    control, _ = run("cuda:0", "cuda_ipc")
    control.hear()
    begin = time.monotonic()
    for slot in range(2):
        control.fill(slot, 1, 16)
        assert slow.began.acquire(timeout=30)
    took = []
    for pending in slow.pending:
        time.sleep(0.2)
        pending.done.set()
        note = control.hear()
        assert isinstance(note, Filled)
        took.append(note.target_us / 1e6)
    assert min(took) >= 0.2
    assert sum(took) <= time.monotonic() - begin


def test_a_probe_does_not_wait_for_forwards(known: Known, slow: SlowTarget, run: Run) -> None:
    control, _ = run("cuda:0", "shm", slots=4)
    control.hear()
    for slot in range(3):
        control.fill(slot, 1, 16)
    for _ in range(2):
        assert slow.began.acquire(timeout=30)
    control.send(FillNoise(slot=3, generation=1, nonce=b"n" * 16, nbytes=100))
    control.filled(3, 1)
    for number in range(3):
        if number == 2:
            assert slow.began.acquire(timeout=30)
        slow.pending[number].done.set()
        control.filled(number, 1)


def test_a_device_that_fails_ends_the_worker(known: Known, slow: SlowTarget, run: Run) -> None:
    control, handle = run("cuda:0", "shm")
    control.hear()
    for slot in range(3):
        control.fill(slot, 1, 16)
    for _ in range(2):
        assert slow.began.acquire(timeout=30)
    slow.pending[0].error = RuntimeError("CUDA error: an illegal memory access was encountered")
    slow.pending[0].done.set()
    assert handle.wait(30)
    assert "a forward failed on the device" in handle.reap()
    assert known["shm"].closed_before_its_arena


PROCESS = "import fake_cuda; fake_cuda.install(); from specd.worker.worker import main; main()"


@contextlib.contextmanager
def process(
    parent_pid: int, *transports: str, code: str = PROCESS
) -> Iterator[tuple[Control, subprocess.Popen[bytes]]]:
    """A worker in a process of its own."""
    with (
        zmq.Context() as context,
        tempfile.TemporaryDirectory(dir=os.environ["XDG_RUNTIME_DIR"], ignore_cleanup_errors=True) as directory,
    ):
        control = Control(context, f"ipc://{directory}/w", "cuda:0", *transports)
        settings = msgspec.structs.replace(
            control.worker, parent_pid=parent_pid, serving=ServerContext(directory=directory)
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "support"), str(ROOT)])}
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment) as child:
            try:
                assert child.stdin is not None
                child.stdin.write(msgspec.json.encode(settings) + b"\n")
                child.stdin.flush()
                yield control, child
            finally:
                child.kill()
                child.wait()
                control.close()
                remove(control.epoch.hex())


def test_trainers_of_both_kinds_read_the_ring_of_a_worker_process() -> None:
    names = ("cuda_ipc", "shm", "bytes")
    with process(os.getpid(), *names) as (control, child), contextlib.ExitStack() as stack:
        started = control.hear()
        assert started.transports == names
        clients = {name: load(name).client("cuda:1" if name == "cuda_ipc" else "cpu") for name in names}
        tasks = [control.fill(0, 1, 40)]
        control.filled(0, 1)
        for name, client in clients.items():
            stack.callback(client.close)
            control.send(Accept(session=name.encode(), transport=name, hello=client.hello()))
            accepted = control.hear()
            assert isinstance(accepted, Accepted), accepted
            client.attach(accepted.offer, 10)
        tasks.append(control.fill(1, 2, 64))
        control.filled(1, 2)
        refs = [SlotRef(task.slot, task.generation, task.layout.nbytes) for task in tasks]
        into = torch.empty(started.ring.slot_bytes, dtype=torch.uint8)
        for name, client in clients.items():
            for ref, task in zip(refs, tasks, strict=True):
                if name == "bytes":
                    control.send(Publish(session=name.encode(), transport=name, ref=ref))
                client.fetch(ref, into, 10)
                assert into[: ref.nbytes].numpy().tobytes() == expected(task)
        control.fill(0, 3, 40)
        control.filled(0, 3)
        for name in ("cuda_ipc", "shm"):
            with pytest.raises(TransportError, match="holds generation 3, the lease is for 1"):
                clients[name].fetch(refs[0], into, 10)
        control.send(Stop())
        assert child.wait(30) == 0
        assert not os.path.exists(started.segment)


STUCK = """
import fake_cuda, workers
from specd.worker import worker
fake_cuda.install()
worker.load_target, worker.CRASH_S = workers.Stuck, 0.2
worker.main()
"""


@pytest.mark.parametrize("finder", ["announcer", "service"])
def test_a_worker_whose_target_hangs_exits_when_any_of_its_threads_fails(finder: str) -> None:
    with process(os.getpid(), "shm", code=STUCK) as (control, child):
        assert isinstance(control.hear(), Started)
        for slot in range(2):
            control.fill(slot, 1, 16)
        if finder == "service":
            control.send(FillNoise(slot=99, generation=1, nonce=b"n" * 16, nbytes=100))
        assert child.wait(30) == 1
        assert not os.path.exists(segment_path(control.epoch.hex()))


def test_a_worker_whose_parent_died_exits_and_removes_its_segment() -> None:
    with subprocess.Popen(["sleep", "600"]) as parent:
        try:
            with process(parent.pid, "shm") as (control, child):
                started = control.hear()
                assert os.path.exists(started.segment)
                parent.kill()
                assert child.wait(30) == 1
                assert not os.path.exists(started.segment)
        finally:
            parent.kill()
