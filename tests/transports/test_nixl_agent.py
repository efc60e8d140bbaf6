"""The NIXL agent: READs that fail or take too long, registrations, and what an import of NIXL may not do."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from specd.errors import TransportError, pip_install
from specd.memory.arena import PAGE, HostArena
from specd.transports.base import ServerContext
from specd.transports.nixl.agent import Destinations, NixlAgent, Region, _nixl
from specd.transports.nixl.transport import Nixl

installed = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in ("nixl_cu13", "nixl_cu12")),
    reason="needs NIXL: pip install --no-deps nixl-cu13",
)


@installed
def test_an_import_leaves_logging_and_standard_output_alone(tmp_path: Path) -> None:
    code = (
        "import logging, sys\n"
        "logging.basicConfig(filename=sys.argv[1], filemode='w', level=logging.INFO)\n"
        "from specd.transports.nixl.agent import NixlAgent\n"
        "NixlAgent('cpu').close()\n"
        "assert logging.raiseExceptions\n"
        "logging.getLogger('mine').info('still here')\n"
    )
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "still here" in log.read_text()


@installed
def test_destinations_are_registered_once_and_until_they_are_gone() -> None:
    with contextlib.closing(NixlAgent("cpu")) as agent:
        known = Destinations(agent)
        first = torch.zeros(1 << 16, dtype=torch.uint8)
        assert known.region(first) == known.region(first)
        assert known.region(first[100:200]) == Region(memory="DRAM", address=first.data_ptr() + 100, nbytes=100)
        assert len(known) == 1
        second = torch.zeros(1 << 16, dtype=torch.uint8)
        known.region(second)
        assert len(known) == 2
        part = second[:10]
        del second
        known.region(part)
        assert len(known) == 2, "the registration went with the tensor it was made for, its view has its own"
        whole = part.as_strided((1 << 16,), (1,))
        known.region(whole)
        assert len(known) == 2, "two registrations overlap"
        del part, whole
        known.region(first)
        assert len(known) == 1


class Registrar:
    """What of an agent `Destinations` needs."""

    def __init__(self) -> None:
        self.known: list[Region] = []

    def register(self, region: Region) -> Region:
        self.known.append(region)
        return region

    def deregister(self, region: Region) -> None:
        self.known.remove(region)


def test_memory_stays_until_it_is_deregistered() -> None:
    """A driver would take what comes to lie there for what was registered, whoever reads into it."""
    agent = Registrar()
    known = Destinations(agent)  # type: ignore[arg-type]
    first, second = np.zeros(4096, np.uint8), np.zeros(4096, np.uint8)
    gone = [weakref.ref(array) for array in (first, second)]
    known.region(torch.from_numpy(first))
    del first
    assert gone[0]() is not None
    known.region(torch.from_numpy(second))
    del second
    assert gone[0]() is None
    assert len(agent.known) == 1
    known.forget()
    assert gone[1]() is None


def test_a_part_that_is_registered_gives_way_to_the_whole() -> None:
    """Among others that are in use: regions that overlap are not registered twice."""
    agent = Registrar()
    known = Destinations(agent)  # type: ignore[arg-type]
    other, whole = (torch.zeros(4096, dtype=torch.uint8) for _ in range(2))
    part = whole[:10]
    regions = [known.region(tensor) for tensor in (other, part, whole)]
    assert agent.known == [regions[0], regions[2]]


class FakeEngine:
    """What a nixl_agent drives."""


class FakeNixl:
    """A nixl_agent whose transfers are in `state` for ever, or raise it."""

    def __init__(self, state: str | Exception) -> None:
        self.agent: FakeEngine | None = FakeEngine()
        self.state = state
        self.released = 0
        self.polled = threading.Event()

    def get_xfer_descs(self, parts: list[tuple[int, int, int]], memory: str) -> object:
        return parts

    def initialize_xfer(self, *args: object, backends: list[str]) -> FakeNixl:
        return self

    def transfer(self, handle: object) -> str:
        return "PROC"

    def check_xfer_state(self, handle: object) -> str:
        self.polled.set()
        if isinstance(self.state, Exception):
            raise self.state
        return self.state

    def release(self) -> None:
        assert self.agent is not None, "released after the engine was destroyed"
        self.released += 1


def fake_agent(state: str | Exception) -> tuple[NixlAgent, FakeNixl]:
    agent = NixlAgent.__new__(NixlAgent)
    nixl = FakeNixl(state)
    agent.name, agent._device, agent._stream, agent._peer, agent._nixl = "fake", "cpu", None, "peer", nixl
    return agent, nixl


PART = Region(memory="DRAM", address=4096, nbytes=8)


@pytest.mark.parametrize(
    ("state", "reason"),
    [("PROC", "did not end within"), ("ERR", "state ERR"), (RuntimeError("gone"), "gone"), (RuntimeError(), "Runtime")],
)
def test_a_read_that_fails_is_released_before_its_engine_is_destroyed(state: str | Exception, reason: str) -> None:
    agent, nixl = fake_agent(state)
    engine = weakref.ref(nixl.agent)
    with pytest.raises(TransportError, match=reason) as failure:
        agent.read(PART, PART, time.monotonic() + 0.05, threading.Event())
    assert failure.value.lost
    assert (nixl.released, nixl.agent, agent.closed) == (1, None, True)
    gc.collect()
    assert engine() is None
    with pytest.raises(TransportError, match="closed") as again:
        agent.read(PART, PART, time.monotonic() + 1, threading.Event())
    assert again.value.lost


def test_a_read_that_ends_well_is_released_and_keeps_the_agent() -> None:
    agent, nixl = fake_agent("DONE")
    agent.read(PART, PART, time.monotonic() + 1, threading.Event())
    assert (nixl.released, agent.closed) == (1, False)
    with pytest.raises(TransportError, match="no time is left") as late:
        agent.read(PART, PART, time.monotonic() - 1, threading.Event())
    assert not late.value.lost
    assert (nixl.released, agent.closed) == (1, False)


def test_a_read_ends_when_its_side_is_closed() -> None:
    agent, nixl = fake_agent("PROC")
    stop = threading.Event()

    def close() -> None:
        assert nixl.polled.wait(10)
        stop.set()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(TransportError, match="being closed"):
        agent.read(PART, PART, time.monotonic() + 60, stop)
    closer.join()
    assert nixl.released == 1


@pytest.mark.parametrize("make", [lambda arena: Nixl.server(arena, ServerContext()), lambda _: Nixl.client("cpu")])
def test_without_nixl_the_error_says_what_to_install(
    make: Callable[[HostArena], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nixl_cu13", "nixl_cu12"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Missing(), *sys.meta_path])
    with (
        HostArena.create(1, PAGE, None) as arena,
        pytest.raises(TransportError, match=re.escape(pip_install("nixl-cuda13"))),
    ):
        make(arena)


@pytest.mark.parametrize(("cuda", "extra"), [("12.8", "cuda12"), ("13.0", "cuda13"), (None, "cuda13")])
def test_what_to_install_follows_torchs_cuda(cuda: str | None, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for name in ("nixl_cu12", "nixl_cu13"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [_Missing(), *sys.meta_path])
    with pytest.raises(TransportError, match=re.escape(pip_install(f"nixl-{extra}"))):
        _nixl("cuda:0")


class _Missing:
    """An import system without NIXL."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.startswith("nixl_cu"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_a_nixl_that_cannot_be_loaded_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "nixl_cu13"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libucp.so: cannot open', name='nixl_cu13._bindings')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nixl_cu13", raising=False)
    with pytest.raises(TransportError, match="libucp"):
        Nixl.client("cpu")


def test_regions() -> None:
    whole = Region(memory="DRAM", address=1000, nbytes=100)
    assert whole.part(10, 20) == Region(memory="DRAM", address=1010, nbytes=20)
    assert whole.covers(whole.part(0, 100))
    assert not whole.part(0, 50).covers(whole)
    assert whole.part(0, 50).overlaps(whole.part(49, 1))
    assert not whole.part(0, 50).overlaps(whole.part(50, 50))
    elsewhere = Region(memory="VRAM", address=1000, nbytes=100)
    assert not whole.overlaps(elsewhere)
    assert not whole.covers(elsewhere)
