"""A worker that keeps states announces them with the bytes it computed, by what a slot holds, and says so."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from msgspec.structs import replace

import fake_cuda
from fills import HIDDEN, draw_tokens, rounded
from specd.config.settings import ReplayConfig, TargetConfig
from specd.daemon.supervisor import ThreadHandle
from specd.memory.states import views
from specd.protocol.batch import slot_layout
from specd.protocol.capture import FP8, CaptureSpec
from specd.replay.files import StoreDirectory
from specd.targets.registry import load_target
from specd.version import __version__
from specd.worker.messages import Filled, FillSlot, Lasts, ReplayCounts, Started, StartFailed, Stop
from specd.worker.replaying import identity_of
from workers import MODEL, SPEC, Control, Known, expected, only_these

GB = 0.001
OTHER = CaptureSpec(taps=(1, 4), final=False, dtype="float32")


class Keeper(Control):
    """Control's end of a worker that keeps states, which runs on a thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], device: str, config: ReplayConfig) -> None:
        exact = config.encoding == "raw"
        super().__init__(context, f"inproc://{secrets.token_hex(4)}", device, "shm", exact=exact, replay=config)
        self.counts: dict[str, int] = {}
        self._handle: ThreadHandle | None = ThreadHandle(self.worker, context)

    def end(self) -> None:
        """End the worker. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with suppress(zmq.Again):  # it never served
                self.send(Stop())
            assert handle.wait(30)
            self.close()
            os.close(handle.fd)

    def hear(self) -> Any:
        """The next note that is no count."""
        while isinstance(note := super().hear(), ReplayCounts):
            for name, count in note.counts.items():
                self.counts[name] = self.counts.get(name, 0) + count
        return note

    def until(self, name: str, count: int) -> None:
        """Wait for a count; nothing else is said meanwhile."""
        while self.counts.get(name, 0) < count:
            note = Control.hear(self)
            assert isinstance(note, ReplayCounts), note
            for key, more in note.counts.items():
                self.counts[key] = self.counts.get(key, 0) + more

    def ask(self, slot: int, generation: int, content: bytes, spec: CaptureSpec = SPEC) -> FillSlot:
        """Ask for a batch whose tokens follow from its content id."""
        task = FillSlot(
            slot=slot, generation=generation, content=content, spec=spec, tokens=draw_tokens(40, content[0]).tobytes(),
            lengths=(40).to_bytes(4, "little"), layout=slot_layout(spec, HIDDEN, 40),
        )  # fmt: skip
        self.send(task)
        return task

    def replayed(self, slot: int, generation: int) -> bool:
        """Whether a slot was filled without a forward."""
        note = self.hear()
        assert isinstance(note, Filled), note
        assert (note.slot, note.generation) == (slot, generation)
        assert not (note.replayed and note.target_us)
        return note.replayed


Run = Callable[..., Keeper]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"fake {device}")
    return only_these(monkeypatch)


@pytest.fixture
def run(known: Known) -> Iterator[Run]:
    """Start workers on threads, each on the CPU or a stand-in's GPU; ended with the test."""
    with zmq.Context() as context, ExitStack() as stack:

        def start(device: str, config: ReplayConfig) -> Keeper:
            control = Keeper(context, device, config)
            stack.callback(control.end)
            return control

        yield start
    assert not fake_cuda.registered


def content(number: int) -> bytes:
    return bytes([number]) * 16


def coded(task: FillSlot) -> bytes:
    """What a slot has of the same batch once it was kept as float8."""
    slot = torch.frombuffer(bytearray(expected(task)), dtype=torch.uint8)
    for states in views(slot, task.layout).values():
        states.copy_(rounded(states))
    return slot.numpy().tobytes()


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
@pytest.mark.parametrize("where", ["disk", "ram"])
@pytest.mark.parametrize("encoding", ["raw", FP8])
def test_a_kept_batch_is_announced_with_the_bytes_it_was_computed_with_or_those_of_its_codes(
    device: str, where: str, encoding: Any, known: Known, run: Run, tmp_path: Path
) -> None:
    kept = ReplayConfig(dir=str(tmp_path / "s"), gb=GB) if where == "disk" else ReplayConfig(ram_gb=GB)
    control = run(device, replace(kept, encoding=encoding))
    started = control.hear()
    assert isinstance(started, Started), started
    assert started.replay is not None
    # 3 rows of 64 · 4 bytes, or of 64 codes and a scale and a page for each tensor but the first.
    cell_bytes = 64 * 3 * 256 if encoding == "raw" else 16384 + 3 * 4096
    assert started.replay.cell_bytes == cell_bytes
    assert 0 <= GB * 1e9 - started.replay.cells * cell_bytes < 5 * 4096 + cell_bytes + 4096 * started.replay.cells
    assert started.replay.used == 0
    for number in (1, 2):
        task = control.ask(number, number, content(number))
        assert not control.replayed(number, number)
        if device == "cpu":
            assert known["shm"].arena.tensor(number)[: task.layout.nbytes].numpy().tobytes() == expected(task)
    control.until("wrote", 2)
    for slot, number in ((0, 2), (1, 1)):
        task = control.ask(slot, 7, content(number))
        assert control.replayed(slot, 7)
        arena = known["shm"].arena
        slots = arena.tensor(slot) if device == "cpu" else None
        if slots is not None:
            again = expected(task) if encoding == "raw" else coded(task)
            assert slots[: task.layout.nbytes].numpy().tobytes() == again
        assert arena.generation(slot) == (7 if device == "cpu" else 0)
    control.until("hit", 2)
    assert control.counts == {"hit": 2, "miss": 2, "wrote": 2, "skipped": 0, "damaged": 0}


def test_what_holds_other_states_of_the_same_content_is_another(run: Run, tmp_path: Path) -> None:
    control = run("cpu", ReplayConfig(ram_gb=GB))
    control.hear()
    control.ask(0, 1, content(1))
    assert not control.replayed(0, 1)
    control.until("wrote", 1)
    control.ask(1, 1, content(1), OTHER)
    assert not control.replayed(1, 1)
    control.until("wrote", 2)
    for slot, spec in enumerate((SPEC, OTHER)):
        control.ask(slot, 2, content(1), spec)
        assert control.replayed(slot, 2)
    control.send(Lasts(lookups=1))
    control.ask(2, 3, content(3))
    assert not control.replayed(2, 3)


def test_among_codes_a_slot_of_codes_is_kept_as_it_lies(known: Known, run: Run) -> None:
    control = run("cpu", ReplayConfig(ram_gb=GB, encoding=FP8))
    control.hear()
    task = control.ask(0, 1, content(1), replace(SPEC, dtype=FP8))
    assert not control.replayed(0, 1)
    control.until("wrote", 1)
    control.ask(1, 1, content(1), task.spec)
    assert control.replayed(1, 1)
    one, other = (known["shm"].arena.tensor(slot)[: task.layout.nbytes] for slot in (0, 1))
    assert one.any()
    assert torch.equal(one, other)


def test_a_store_in_use_or_of_other_states_keeps_a_worker_from_starting(run: Run, tmp_path: Path) -> None:
    def refused(device: str, config: ReplayConfig) -> str:
        control = run(device, config)
        failed = control.hear()
        control.end()  # it gives the store back a moment after it has said why
        assert isinstance(failed, StartFailed)
        return failed.reason

    place = StoreDirectory(tmp_path / "s", 10**6, 4242)
    config = ReplayConfig(dir=str(tmp_path / "s"), gb=GB)
    assert refused("cpu", config).startswith("another daemon (pid 4242) uses")
    place.close()
    assert "without a size" in refused("cpu", ReplayConfig(dir=str(tmp_path / "s")))
    control = run("cpu", config)
    assert isinstance(control.hear(), Started)
    control.end()
    reason = refused("cpu", replace(config, encoding=FP8))
    assert "another exact: False, not True, encoding: float8_e4m3fn, not raw: give another --replay" in reason
    reason = refused("cuda:1", config)
    assert "holds states of synthetic on synthetic of specd" in reason
    assert "another device: " in reason


def test_whose_states_they_are(known: Known) -> None:
    config = TargetConfig(model=MODEL, exact=True)
    found = identity_of(config, load_target(config))
    assert (found.model, found.backend, found.device) == ("synthetic", f"synthetic of specd {__version__}", "cpu")
    assert found.fingerprint == load_target(config).contract.fingerprint
    merged = replace(config, exact=False, device="cuda:1", prefill_graphs=(64,), tp=2, attention_backend="fa3")
    unlike = found.unlike(identity_of(merged, load_target(replace(config, device="cuda:1"))))
    assert unlike == ["device", "exact", "tp", "attention", "graphs"]

    class Foreign:
        __module__ = "numpy.backend"
        contract, device = load_target(config).contract, "cpu"

    assert identity_of(config, Foreign()).backend.startswith("numpy 2.")  # type: ignore[arg-type]
