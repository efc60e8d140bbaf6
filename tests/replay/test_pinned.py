"""Cells in memory: slots go there and back, within the budget, and a host without as much memory is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import fake_cuda
from specd.errors import ConfigError, TransportError
from specd.memory import cuda
from specd.memory.arena import MAX_SLOTS, PAGE, HostArena
from specd.memory.device_arena import DeviceArena
from specd.replay import pinned
from specd.replay.pinned import Pinned, available, cells_in


@pytest.fixture(params=["cpu", "cuda:1"])
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostArena | DeviceArena]:
    fake_cuda.install(monkeypatch)
    found: HostArena | DeviceArena = (
        HostArena.create(3, 2 * PAGE, None)
        if request.param == "cpu"
        else DeviceArena.create(3, 2 * PAGE, request.param, None, mirrored=False)
    )
    with closing(found):
        yield found


def test_cells_hold_what_is_saved_and_slots_what_is_loaded(ring: HostArena | DeviceArena) -> None:
    copier = cuda.Copier()
    with closing(Pinned(3, ring)) as cells:
        assert all(cells.view(cell).nbytes == ring.stride for cell in range(3))
        ring.tensor(0)[:] = 7
        ring.seal(0, 1, 100)
        ring.tensor(1)[:] = 9
        assert cells.save(2, 0, 1, 100, copier)
        cells.load(2, 1, 5, 100, copier)
        assert ring.generation(1) == 5
        assert ring.tensor(1).tolist() == [7] * 100 + [9] * (2 * PAGE - 100)
    cells.close()


def test_a_slot_that_is_refilled_before_or_under_the_copy_is_not_saved(
    ring: HostArena | DeviceArena, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Pinned(3, ring)) as cells:
        ring.seal(0, 2, 100)
        assert not cells.save(0, 0, 1, 100, cuda.Copier())
        view, tensor = cells.view, cells.tensor

        def refilled(look: Callable[[int], Any]) -> Callable[[int], Any]:
            def found(cell: int) -> Any:
                ring.begin(0)
                return look(cell)

            return found

        monkeypatch.setattr(cells, "view", refilled(view))
        monkeypatch.setattr(cells, "tensor", refilled(tensor))
        assert not cells.save(0, 0, 2, 100, cuda.Copier())


def test_for_a_gpu_they_are_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    with closing(DeviceArena.create(1, PAGE, "cuda:1", None, mirrored=False)) as ring:
        before = sum(fake_cuda.registered.values())
        cells = Pinned(3, ring)
        assert sum(fake_cuda.registered.values()) - before == 4 * PAGE
        cells.close()
        assert sum(fake_cuda.registered.values()) == before

        def refused(*_: object) -> None:
            raise TransportError("the driver does not page-lock it")

        with monkeypatch.context() as patch:
            patch.setattr(cuda, "register", refused)
            with pytest.raises(TransportError, match="page-lock"):
                Pinned(3, ring)


@pytest.mark.parametrize("cell_bytes", [PAGE, 9 * PAGE, 63 << 20])
@pytest.mark.parametrize("budget", [10**6, 10**9])
def test_the_budget_is_never_passed(budget: int, cell_bytes: int) -> None:
    if budget < cell_bytes:
        with pytest.raises(ConfigError, match="no room for one batch"):
            cells_in(budget, cell_bytes)
        return
    cells = cells_in(budget, cell_bytes)
    header = -(-64 * (cells + 1) // PAGE) * PAGE
    assert header + cells * cell_bytes <= budget
    assert cells == MAX_SLOTS or header + (cells + 4) * cell_bytes > budget


def test_a_host_or_a_container_without_so_much_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  64 kB\nMemAvailable:   8000000 kB\n")
    assert available(tmp_path, tmp_path / "nothing") == 8_000_000 << 10
    for name, text in (("max", "max"), ("current", "100"), ("stat", "file 7\ninactive_file 50\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert available(tmp_path, tmp_path) == 8_000_000 << 10
    (tmp_path / "memory.max").write_text("1000\n")
    assert available(tmp_path, tmp_path) == 950
    assert available() > 0
    monkeypatch.setattr(pinned, "available", lambda: 5 * 10**9)
    with pytest.raises(ConfigError, match=r"--replay-ram-gb 64: this host has 5\.0 GB"):
        cells_in(64 * 10**9, PAGE)
