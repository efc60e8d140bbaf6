"""What a launcher such as torchrun says of this process, and which device a rank of it trains on."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

import torch

from specd.config.settings import TrainConfig
from specd.errors import ConfigError, TransportError
from specd.memory import cuda
from specd.train.checkpoint import Identity
from specd.version import __version__


class Launch(NamedTuple):
    """One process of a launcher; one alone without. local, here: rank and number of ranks on this host.

    restarts: how often the launcher has started the run again, as far as this host knows.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    here: int = 1
    restarts: int = 0


def launched() -> Launch:
    """This process by the environment that torchrun sets. Raises ConfigError where half of it is missing."""
    size = os.environ.get("WORLD_SIZE", "").strip()
    if not size.isdecimal() or int(size) < 2:
        return Launch()
    found = {name: os.environ.get(name, "").strip() for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")}
    if not (all(found.values()) and found["RANK"].isdecimal()):
        missing = ", ".join(name for name, value in found.items() if not value) or f"number in RANK={found['RANK']}"
        raise ConfigError(
            f"WORLD_SIZE={size} in the environment and no {missing}: start {size} ranks with `torchrun "
            f"--nproc-per-node {size} -m specd train …`, which sets them, or one process with WORLD_SIZE unset"
        )
    rank = int(found["RANK"])
    return Launch(
        rank,
        int(size),
        int(os.environ.get("LOCAL_RANK", rank)),
        int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def identity() -> str:
    """What is equal in all starts of one launcher: its own name for the run, else the process that it is."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if name not in ("", "none"):
        return name
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{socket.gethostname()}:{parent}:{started}"


def device_of(config: TrainConfig, launch: Launch) -> str:
    """The device of this process: `auto` is a GPU of its own where there is one, else cpu.

    Raises ConfigError for one that is not here, or that several ranks would share.
    """
    asked, count = config.device, torch.cuda.device_count()
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if launch.size > 1 and config.collectives == "nccl" and asked == "cpu":
        raise ConfigError(
            "train.collectives=nccl: expected gloo or auto for ranks on the CPU, which nccl does not reach"
        )
    if asked == "cpu":
        return asked
    if launch.size > 1 and asked != "cuda" and config.collectives != "gloo":
        raise ConfigError(
            f"train.device={asked} for {launch.size} ranks: expected auto, as each needs a GPU of its own; leave it "
            f"out, or have them share this one with train.collectives=gloo, which is slow"
        )
    if launch.size > 1 and asked == "cuda" and count:
        asked = f"cuda:{launch.local % count}"
    try:
        cuda.ordinal(asked)
    except TransportError as error:
        raise ConfigError(f"train.device: {error}; use auto, cpu or cuda:N") from None
    return asked


def facts(own: Identity, device: str, collectives: str) -> dict[str, str]:
    """What has to be equal on all ranks of a run, by name. own: of its checkpoints."""
    found = {"specd": __version__, "target": own.target, "train.device": device.partition(":")[0]}
    found |= {name: str(value) for name, value in own.settings.items() if name != "data.digest"}
    return found | {"train.collectives": collectives, "data": str(own.settings["data.digest"])}


def check_shares(accumulation: int, size: int) -> str:
    """What is wrong with so many ranks for an optimizer step of `accumulation` batches; empty if nothing.

    Raises ConfigError where a rank would never have one.
    """
    if size > accumulation:
        raise ConfigError(
            f"train.accumulation={accumulation} batches a step cannot be shared by {size} ranks: set it to a multiple "
            f"of {size} (the optimizer's batch grows: look at train.lr), or start {accumulation} ranks"
        )
    if accumulation % size:
        idle = 1 - accumulation / (-(-accumulation // size) * size)
        return (
            f"train.accumulation={accumulation} over {size} ranks: {idle:.0%} of the ranks' time is idle; take a "
            f"multiple of {size}"
        )
    return ""
