"""What a launcher's environment says, which device a rank takes, and how many ranks a step feeds."""

from __future__ import annotations

import pytest
import torch

from specd.config.settings import TrainConfig
from specd.errors import ConfigError
from specd.train.launcher import Launch, check_shares, device_of, identity, launched

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1",
    "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip


def test_one_process_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert launched() == Launch(rank=5, size=8, local=1, here=4, restarts=2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched() == Launch()
    monkeypatch.setenv("WORLD_SIZE", " 8 ")
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(
        ConfigError, match=r"WORLD_SIZE=8 in the environment and no MASTER_PORT: start 8 ranks .*torchr"
    ):
        launched()
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match="no number in RANK=one"):
        launched()


def test_a_launcher_is_known_by_its_run_or_by_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    assert identity() == "job-7"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    here = identity()
    assert here != "none"
    assert here == identity()
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert identity() != here


@pytest.mark.parametrize(
    ("accumulation", "size", "said"),
    [(8, 4, ""), (4, 4, ""), (3, 2, "25% of the ranks' time is idle; take a multiple of 2"), (1, 1, "")],
)
def test_a_step_is_shared_evenly_or_it_is_said(accumulation: int, size: int, said: str) -> None:
    found = check_shares(accumulation, size)
    assert found.endswith(said)
    assert bool(found) == bool(said)


def test_more_ranks_than_batches_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.accumulation=2 .* by 8 ranks: set it to a multiple of 8 .* start 2 "
    ):
        check_shares(2, 8)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("config", "local", "device"),
    [
        (TrainConfig(), 1, "cuda:1"),
        (TrainConfig(device="cuda"), 0, "cuda:0"),
        (TrainConfig(), 2, "cuda:0"),  # a launcher may show each rank its own GPU alone; `join` finds two on one
        (TrainConfig(device="cuda:1", collectives="gloo"), 0, "cuda:1"),
        (TrainConfig(device="cpu"), 1, "cpu"),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own(config: TrainConfig, local: int, device: str) -> None:
    assert device_of(config, Launch(rank=local, size=3, local=local, here=3)) == device


@pytest.mark.usefixtures("gpus")
def test_a_device_that_cannot_be_is_refused() -> None:
    pair = Launch(size=2, here=2)
    with pytest.raises(ConfigError, match=r"train\.device=cuda:1 for 2 ranks: .*train\.collectives=gloo"):
        device_of(TrainConfig(device="cuda:1"), pair)
    with pytest.raises(ConfigError, match=r"train\.collectives=nccl: expected gloo or auto"):
        device_of(TrainConfig(device="cpu", collectives="nccl"), pair)
    with pytest.raises(ConfigError, match=r"train\.device: device cuda:7 is not here"):
        device_of(TrainConfig(device="cuda:7"), Launch())
    assert device_of(TrainConfig(device="cuda:1"), Launch()) == "cuda:1"
