"""Data-parallel training on GPUs: what one rank trains, over nccl and over gloo, and no weight of a torn exchange.

On a machine with two GPUs: `SPECD_REQUIRE_GPU=1 python3 -m pytest -q tests/system/test_gpu_data_parallel.py`.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from faults import ASKED, SEED, daemons, write_data
from forks import Nursery
from ranks import Launched
from specd.train.journal import StepRecord

TARGET = "synthetic:hidden=512,layers=8,vocab=256,ms=2"
SLOW_WIRE = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}
"""Environment in which an exchange takes most of a step, so that a kill at random falls into one."""
GONE_S = 12.0
"""The others are gone within this: a rank that is killed is seen at once, and what its end costs is CUDA's."""


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = write_data(tmp_path_factory.mktemp("data") / "tokens.jsonl")
    return ["--data", str(path), "--model", TARGET]


@pytest.fixture(scope="module")
def alone(nursery: Nursery, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[StepRecord]]:
    """The steps of one process on one GPU, by draft."""
    place = tmp_path_factory.mktemp("alone")
    return {
        name: Launched(nursery, 1, place / name, data, method=name, device="cuda:0").finish()
        for name in ("dflash", "eagle3")
    }


def assert_alike(found: list[StepRecord], expected: list[StepRecord], size: int) -> None:
    assert [record.batches for record in found] == [record.batches for record in expected]
    assert {record.ranks for record in found} == {size} if size else True
    losses = [[record.loss for record in records] for records in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


def saved(run: Launched) -> dict[int, Path]:
    return {int(path.name[5:]): path for path in (run.output / "checkpoints").glob("step-*")}


@pytest.mark.gpu(1)
@pytest.mark.parametrize("method", ["dflash", "eagle3"])
def test_two_ranks_share_one_gpu_over_gloo(
    nursery: Nursery, data: list[str], tmp_path: Path, alone: dict[str, list[StepRecord]], method: str
) -> None:
    run = Launched(
        nursery, 2, tmp_path / "run", data, {"train.collectives": "gloo"}, method=method, device="cuda:0"
    )  # fmt: skip
    assert_alike(run.finish(), alone[method], 2)


@pytest.mark.gpu(1)
def test_the_word_that_an_abort_takes_back_is_read_when_the_stream_comes_to_it() -> None:
    """`Ranks.gather` rests on it: after kernels that were aborted, every later step is seen as torn."""
    sleep: Any = torch.cuda._sleep
    alive, found = torch.ones(1).pin_memory(), []
    torch.zeros(1, device="cuda")
    for _ in range(2):
        sleep(int(2e8))  # at least 0.1 s
        found.append(alive.to("cuda", non_blocking=True))
        if len(found) == 1:
            torch.cuda.synchronize()
    alive.zero_()  # the host is ahead of the second copy
    assert [float(word) for word in found] == [1.0, 0.0]


@pytest.mark.gpu(2)
@pytest.mark.parametrize("method", ["dflash", "eagle3"])
def test_two_ranks_over_nccl_train_what_one_trains(
    nursery: Nursery, data: list[str], tmp_path: Path, alone: dict[str, list[StepRecord]], method: str
) -> None:
    pair = [Launched(nursery, 2, tmp_path / "a", data, method=method, device="auto")]
    assert_alike(pair[0].finish(), alone[method], 2)
    pair.append(Launched(nursery, 2, tmp_path / "b", data, method=method, device="auto"))
    pair[1].finish()
    one, other = ((run.output / "draft" / "model.safetensors").read_bytes() for run in pair)
    assert one == other, "to the bit"


@pytest.mark.gpu(2)
def test_two_ranks_over_nccl_beside_a_daemon_on_one_of_their_gpus(
    nursery: Nursery, data: list[str], tmp_path: Path
) -> None:
    with daemons("cuda:1", lease_s=10.0) as start:
        daemon = start("a")
        daemon.status()
        link = [*data[:2], "--endpoint", daemon.endpoint]
        one = Launched(nursery, 1, tmp_path / "one", link, device="cuda:0").finish()
        assert_alike(Launched(nursery, 2, tmp_path / "two", link, device="auto").finish(), one, 2)


@pytest.mark.gpu(2)
def test_a_run_goes_on_from_two_gpus_to_one_and_back(
    nursery: Nursery, data: list[str], tmp_path: Path, alone: dict[str, list[StepRecord]]
) -> None:
    output = tmp_path / "run"
    begun = 0
    for size, fault in ((2, signal.SIGKILL), (1, signal.SIGTERM)):
        device = "auto" if size > 1 else "cuda:1"
        run = Launched(nursery, size, output, [*data, "--resume"], device=device)
        run.wait_for(begun + 6)
        run.signal(size - 1, fault)
        run.wait()
        begun = run.steps()
    last = Launched(nursery, 2, output, [*data, "--resume"], device="auto")
    assert_alike(last.finish(), alone["dflash"], 0)
    assert {record.ranks for record in last.records()} == {1, 2}


@pytest.mark.gpu(2)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_ends_the_other(nursery: Nursery, data: list[str], tmp_path: Path, rank: int) -> None:
    run = Launched(nursery, 2, tmp_path / "run", data, {"train.epochs": 9, "train.save_every": 1}, device="auto")
    run.wait_for(4)
    at = run.signal(rank, signal.SIGSTOP)
    assert run.wait(rank) == [1], run.logs
    assert time.monotonic() - at < GONE_S + 5
    run.signal(rank, signal.SIGKILL)
    run.forks[rank].wait()
    (said,) = run.said()
    assert f"rank {rank} on " in said
    assert "no sign of life for 5 s" in said
    if rank:
        assert max(saved(run)) == run.steps(), "the very step"


@pytest.mark.gpu(2)
def test_a_kill_in_mid_exchange_leaves_the_weights_of_the_last_whole_step(
    nursery: Nursery, data: list[str], tmp_path: Path
) -> None:
    """Rank 0 saves after each: its checkpoint is that of an undisturbed run at the same step."""
    rng = random.Random(SEED)
    settings = {"train.epochs": 2, "train.save_every": 1, "train.keep": 100, "train.log_every": 4}
    whole = Launched(nursery, 2, tmp_path / "whole", data, settings, device="auto", environment=SLOW_WIRE)
    whole.finish()
    expected = saved(whole)
    for number in range(ASKED or 5):
        often = settings | {"train.save_every": 0}
        run = Launched(nursery, 2, tmp_path / f"{number}", data, often, device="auto", environment=SLOW_WIRE)
        run.wait_for(4 * rng.randrange(1, 6))
        time.sleep(rng.uniform(0, 0.2))
        at = run.signal(1, signal.SIGKILL)
        code = run.forks[0].wait()
        took = time.monotonic() - at
        run.forks[1].wait()
        which = f"seed {SEED}, kill {number}: {run.logs}"
        if code == 0:
            continue
        assert code == 1, which
        assert took < GONE_S, which
        (said,) = run.said()
        assert "rank 1 on " in said, which
        assert "its process is dead; the checkpoint of step " in said, which
        ((step, path),) = saved(run).items()
        assert step == run.steps(), which
        found, wanted = (load_file(at / "model.safetensors") for at in (path, expected[step]))
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=f"{name} of step {step}: {which}")
        extra, moments = (load_file(at / "optimizer.safetensors") for at in (path, expected[step]))
        for name, tensor in moments.items():
            if name.startswith("adam."):
                torch.testing.assert_close(extra[name], tensor, rtol=1e-3, atol=1e-7, msg=f"{name}: {which}")


@pytest.mark.gpu(2)
def test_ranks_that_would_share_a_gpu_over_nccl_are_refused(nursery: Nursery, data: list[str], tmp_path: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0"}
    run = Launched(nursery, 2, tmp_path / "run", data, device="auto", environment=environment)
    assert run.wait() == [2, 2], run.logs
    (said,) = run.said()
    assert "ranks 0 and 1 on" in said
    assert "train.collectives=gloo" in said
    run = Launched(nursery, 2, tmp_path / "run", data, device="cuda:1")
    assert run.wait() == [2, 2], run.logs
    assert "train.device=cuda:1 for 2 ranks" in run.said()[0]
