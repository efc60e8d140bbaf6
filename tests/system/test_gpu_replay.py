"""On a GPU: states that went through page-locked memory, or a disk, are the computed ones, or what their codes say."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from members import SPECS, digest, digest_rounded, follow, own_process
from specd.client.ask import ask_status
from specd.protocol.capture import FP8

COUNT = 30


@pytest.mark.gpu(1)
@pytest.mark.parametrize("where", ["disk", "ram"])
@pytest.mark.parametrize("encoding", ["raw", FP8])
def test_kept_states_are_on_a_gpu_the_computed_ones_or_what_their_codes_say(
    encoding: str, where: str, tmp_path: Path
) -> None:
    flags = ["--replay", str(tmp_path / "s"), "--replay-gb", "0.01"] if where == "disk" else ["--replay-ram-gb", "0.01"]
    flags += ["--device", "cuda:0", "--transports", "cuda_ipc,shm", "--replay-encoding", encoding]
    flags += ["--set", f"target.exact={str(encoding == 'raw').lower()}"]
    once_kept = digest if encoding == "raw" else digest_rounded
    with own_process(*flags) as endpoint:
        stream = partial(follow, endpoint, spec=SPECS[1], count=COUNT)
        first = stream(transport="cuda_ipc", device="cuda:0", of=lambda each: f"{digest(each)} {once_kept(each)}")
        computed, kept = zip(*(both.split() for both in first.digests), strict=True)
        for transport, device in (("cuda_ipc", "cuda:0"), ("shm", "cpu"), ("cuda_ipc", "cuda:0")):
            found = stream(transport=transport, device=device).digests
            assert all(one in ways for one, *ways in zip(found, computed, kept, strict=True))
            assert sum(map(str.__eq__, found, kept)) >= 0.9 * COUNT
        counts = ask_status(endpoint, 30).counters
    assert len(set(computed)) == len(set(kept)) == COUNT
    assert counts["replay_hit"] >= 0.95 * 3 * COUNT
    assert counts["replay_damaged"] == 0
