"""Cells in memory: within the budget, page-locked for a GPU, and refused where the host has not as much."""

from __future__ import annotations

from pathlib import Path

import pytest

import fake_cuda
from specd.errors import ConfigError, TransportError
from specd.memory import cuda
from specd.memory.arena import MAX_SLOTS, PAGE
from specd.replay import pinned
from specd.replay.pinned import Pinned, available, cells_in


def test_cells_hold_what_is_put_there() -> None:
    cells = Pinned(3, 2 * PAGE, "cpu")
    for cell in range(3):
        cells.view(cell)[:] = bytes([cell]) * cells.cell_bytes
    assert [set(cells.tensor(cell).tolist()) for cell in range(3)] == [{0}, {1}, {2}]
    cells.close()
    cells.close()


def test_for_a_gpu_they_are_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    cells = Pinned(3, PAGE, "cuda:1")
    assert sum(fake_cuda.registered.values()) == 4 * PAGE
    cells.close()
    assert not fake_cuda.registered

    def refused(*_: object) -> None:
        raise TransportError("the driver does not page-lock it")

    monkeypatch.setattr(cuda, "register", refused)
    with pytest.raises(TransportError, match="page-lock"):
        Pinned(3, PAGE, "cuda:1")


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
