"""Process groups of one benchmark: formed at a file, and never waited for without end."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from specd.bench.pipeline import process_group
from specd.bench.pipeline.process_group import joined, shake_hands
from specd.errors import TransportError


def test_two_ranks_meet_and_shake_hands(tmp_path: Path) -> None:
    met: list[int] = []

    def one(rank: int) -> None:
        with joined("gloo", str(tmp_path / "store"), rank, 2) as group:
            shake_hands(group, rank, "cpu")
            met.append(rank)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(met) == [0, 1]


def test_a_group_that_does_not_form_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("timed out")

    monkeypatch.setattr(torch.distributed, "ProcessGroupGloo", fail)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    reason = "torch.distributed does not form a gloo group: timed out"
    with pytest.raises(TransportError, match=reason), joined("gloo", str(tmp_path / "store"), 0, 2):
        pass
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_a_transfer_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def recv(self, *_: Any) -> Any:
            return self

        def is_completed(self) -> bool:
            return False

    monkeypatch.setattr(process_group, "HANDSHAKE_S", 0.0)
    monkeypatch.setattr("torch.zeros", lambda *_, **__: None)
    with pytest.raises(TransportError, match="nothing was transferred in 0 s"):
        shake_hands(Silent(), 1, "cuda:1")
