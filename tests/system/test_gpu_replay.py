"""On a GPU: states that went through page-locked memory, or a disk, and back are those that were computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from members import SPECS, follow, own_process
from specd.client.ask import ask_status

COUNT = 30


@pytest.mark.gpu(1)
@pytest.mark.parametrize("where", ["disk", "ram"])
def test_kept_states_are_the_computed_ones_on_a_gpu(where: str, tmp_path: Path) -> None:
    flags = ["--replay", str(tmp_path / "s"), "--replay-gb", "0.01"] if where == "disk" else ["--replay-ram-gb", "0.01"]
    flags += ["--device", "cuda:0", "--transports", "cuda_ipc,shm"]
    with own_process(*flags) as endpoint:
        computed = follow(endpoint, "cuda_ipc", SPECS[1], COUNT, device="cuda:0")
        for transport, device in (("cuda_ipc", "cuda:0"), ("shm", "cpu"), ("cuda_ipc", "cuda:0")):
            assert follow(endpoint, transport, SPECS[1], COUNT, device=device).digests == computed.digests
        counts = ask_status(endpoint, 30).counters
    assert len(set(computed.digests)) == COUNT
    assert counts["replay_hit"] >= 0.95 * 3 * COUNT
    assert counts["replay_damaged"] == 0
