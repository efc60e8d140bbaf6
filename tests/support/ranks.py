"""Ranks of a data-parallel run without a launcher's seconds: forks that find what torchrun would have told them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed

from faults import PROGRESS_S
from forks import Fork, Nursery
from specd.train.journal import StepRecord, read

distributed: Any = torch.distributed  # not all of it is exported for checkers

SETTINGS = {
    "draft.attention": "sdpa", "data.batch_tokens": 80, "data.max_length": 40, "train.epochs": 1,
    "train.save_every": 5, "train.dtype": "float32", "train.threads": 1, "train.accumulation": 3,
    "subscriber.connect_s": 5,
}  # fmt: skip
DFLASH = {
    "draft.num_layers": 1, "draft.num_taps": 2, "draft.block_size": 4, "draft.num_anchors": 4,
    "draft.mask_token_id": 255,
}  # fmt: skip
EAGLE3 = {"draft.num_steps": 3, "draft.draft_vocab_size": 160}


class Launched:
    """`size` ranks that train in `output`. Each has a log of its own; `logs` are those of all."""

    def __init__(
        self,
        nursery: Nursery,
        size: int,
        output: Path,
        arguments: Sequence[str],
        settings: Mapping[str, Any] | None = None,
        *,
        method: str = "dflash",
        own: Mapping[int, Sequence[str]] | None = None,
        restarts: int = 0,
        launcher: str = "",
        device: str = "cpu",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """own: more arguments for some ranks. restarts: of the launcher, which is known by the output's name."""
        self.output, self.size = output, size
        self._store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False,
                                           timeout=timedelta(seconds=60))  # fmt: skip
        settings = SETTINGS | (DFLASH if method == "dflash" else EAGLE3) | dict(settings or {})
        command = ["train", method, "--device", device, "--output", str(output), *arguments]
        command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        self.forks: list[Fork] = []
        for rank in range(size):
            own_environment = dict(environment or {}) | {
                "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restarts),
                "TORCHELASTIC_RUN_ID": launcher or output.name,
            }  # fmt: skip
            log = output.with_name(f"{output.name}-{rank}.log")
            log.write_bytes(b"")
            more = (own or {}).get(rank, ())
            self.forks.append(nursery.start(log, [*command, *more], own_environment if size > 1 else {}))

    @property
    def logs(self) -> str:
        return "\n".join(f"--- rank {rank}\n{fork.log.read_text()}" for rank, fork in enumerate(self.forks))

    def steps(self) -> int:
        """Optimizer steps in the journal so far."""
        journal = self.output / "metrics.jsonl"
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    def wait_for(self, steps: int) -> None:
        """Wait until so many steps are in the journal."""
        limit = time.monotonic() + PROGRESS_S
        while self.steps() < steps:
            assert time.monotonic() < limit, f"no step {steps}: {self.logs}"
            time.sleep(0.005)  # progress of another process: nothing to wait on

    def signal(self, rank: int, number: signal.Signals) -> float:
        """Send a signal to a rank; when that was."""
        os.kill(self.forks[rank].pid, number)
        return time.monotonic()

    def wait(self, *but: int) -> list[int]:
        """The exit codes of all ranks but some."""
        return [fork.wait() for rank, fork in enumerate(self.forks) if rank not in but]

    def said(self) -> list[str]:
        """What all ranks said was wrong, one entry for each that said something."""
        lines = [line for fork in self.forks for line in fork.log.read_text().splitlines()]
        return [line for line in lines if line.startswith(("specd: ", "Traceback"))]

    def finish(self) -> list[StepRecord]:
        """The records, once all ranks have ended well."""
        codes = self.wait()
        assert codes == [0] * self.size, self.logs
        return self.records()

    def records(self) -> list[StepRecord]:
        return read(self.output / "metrics.jsonl")
