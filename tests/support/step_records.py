"""Steps, evaluations and directories of runs that never ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from specd.config.settings import RunConfig
from specd.evaluate.results import EVALS, EvalFacts, Evaluation, PromptResult
from specd.train.directory import JOURNAL, RunFacts, write_facts
from specd.train.journal import Journal, StepRecord, TrainedBatch
from specd.train.measurement import Measurement


def record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "epoch": 0,
        "batches": (TrainedBatch(epoch=0, index=step, samples=(step, step + 100)),),
        "loss": 8.0 / step,
        "teacher_forced_accuracy": 0.25,
        "teacher_forced_by_offset": (0.5, 0.0, None),
        "lr": 1e-3,
        "grad_norm": 0.1,
        "weight": 3.0,
        "tokens": 500,
        "step_s": 2.0,
        "target_wait_s": 1.5,
        "wire_wait_s": 0.1,
        "train_s": 0.4,
        "forward_s": 1.6,
        "busy_slots": 3,
        "num_slots": 8,
    }
    return StepRecord(**(values | changes))


def measurement(step: int, **changes: Any) -> Measurement:
    """Of held-out rows: the lowest loss was at step 10."""
    values: dict[str, Any] = {
        "step": step,
        "loss": 2.5 + (step - 10) / 40,
        "teacher_forced_accuracy": 0.25,
        "teacher_forced_by_offset": (0.5, None),
        "by_offset": {"cross_entropy": (2.0, None)},
        "weight": 3.0,
        "tokens": 1234,
        "seconds": 1.0,
        "best": step == 10,
        "best_loss": 2.5,
        "best_step": 10,
    }
    return Measurement(**(values | changes))


def timed(step: int, step_s: float) -> StepRecord:
    """A step of two samples that took `step_s` seconds."""
    return record(step, step_s=step_s, train_s=0.75 * step_s, wire_wait_s=0.05 * step_s, target_wait_s=0.2 * step_s)


def evaluation(untrained: bool, length: float, accepted: tuple[float, ...]) -> EvalFacts:
    row = PromptResult(
        prompt_tokens=9,
        new_tokens=41,
        forwards=30,
        acceptance_length=length,
        identical=True,
        seconds=1.0,
        greedy_seconds=1.0,
    )
    result = Evaluation(
        acceptance_length=length,
        acceptance_by_offset=accepted,
        identical=True,
        mismatches=(),
        new_tokens=82,
        forwards=60,
        tokens_per_s=20.0,
        greedy_tokens_per_s=25.0,
        prompts=(row, row),
    )
    return EvalFacts(model="m", draft="d", untrained=untrained, block_size=4, max_new_tokens=41, result=result)


FACTS = RunFacts(
    started="2026-01-01 00:00 UTC",
    target={"model": "<b>tiny</b> & co"},
    draft={"method": "DFlash (a paper)", "block size": 4},
    data={"samples": 12},
    transports={"ipc:///tmp/x.sock": "shm"},
    machine={"processor": "abacus"},
    config=msgspec.json.decode(msgspec.json.encode(RunConfig(method="dflash"))),
)


def make_run(path: Path, steps: int = 40, evals: bool = True) -> Path:
    with Journal(path / JOURNAL) as journal:
        for step in range(1, steps + 1):
            journal.append(record(step))
    write_facts(path, FACTS)
    if evals:
        for name, facts in (
            ("untrained", evaluation(True, 1.0, (0.0, 0.0, 0.0))),
            ("trained", evaluation(False, 1.37, (0.3, 0.1, 0.0))),
        ):
            (path / EVALS[name]).write_bytes(msgspec.json.encode(facts))
    return path
