"""What a run came to: time, speed, loss, memory, and where the time went."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from specd import units
from specd.train.journal import StepRecord, bound
from specd.train.measurement import Measurement

RECENT = 20
"""Steps that a recent mean is over."""


class Epoch:
    """Where the batches of one epoch came from. A step across the end of an epoch counts for neither."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.batches = self.shared = self.replayed = 0

    def add(self, record: StepRecord) -> None:
        """Take one of its steps."""
        if all(batch.epoch == self.number for batch in record.batches):
            self.batches += len(record.batches)
            self.shared += record.shared
            self.replayed += record.replayed

    def __str__(self) -> str:
        whole = max(1, self.batches)
        own = self.batches - self.shared - self.replayed
        others = f", forwards of others {self.shared / whole:.0%}" if self.shared else ""
        return f"epoch {self.number + 1}: {self.replayed / whole:.0%} replayed, target {own / whole:.0%}{others}"


class Totals:
    """Sums over the steps of this process. recent: the last RECENT. epoch: the one that is trained.

    in_share: whether the run shares forwards, so that the summary says how, also if it led and had no others' itself.
    """

    def __init__(self, *, in_share: bool = False) -> None:
        self.in_share = in_share
        self.held_out: Measurement | None = None
        self.recent: deque[StepRecord] = deque(maxlen=RECENT)
        self.epoch: Epoch | None = None
        self.steps = self.tokens = self.resubmitted = self.reconnects = self.batches = self.shared = self.replayed = 0
        self.step_s = self.target_s = self.wire_s = self.train_s = 0.0

    def add(self, record: StepRecord) -> Epoch | None:
        """Take one more step; returns the epoch that is over with it, if one is."""
        over = self.epoch
        if over is None or record.epoch != over.number:
            self.epoch = Epoch(record.epoch)
        assert self.epoch is not None
        self.epoch.add(record)
        self.recent.append(record)
        self.steps += 1
        self.tokens += record.tokens
        self.resubmitted += record.resubmitted
        self.reconnects += record.reconnects
        self.batches += len(record.batches)
        self.shared += record.shared
        self.replayed += record.replayed
        self.step_s += record.step_s
        self.target_s += record.target_wait_s
        self.wire_s += record.wire_wait_s
        self.train_s += record.train_s
        return over if over is not self.epoch else None

    def mean_loss(self) -> float | None:
        """The mean loss of the recent steps that had one."""
        return _mean([record.loss for record in self.recent if record.loss is not None])

    def accuracy(self) -> float | None:
        """The mean teacher-forced accuracy of the recent steps."""
        known = [record.teacher_forced_accuracy for record in self.recent]
        return _mean([value for value in known if value is not None])

    def lines(self, elapsed_s: float, memory: str) -> Iterator[str]:
        """The summary, none of it wider than 80 columns. elapsed_s: wall time, what came before the first step too."""
        if not self.recent:
            return
        speed = f"{self.tokens / (self.step_s or 1.0):,.0f} tokens/s, {units.duration(self.step_s / self.steps)} a step"
        yield f"time    {units.duration(elapsed_s)}, {self.steps:,} steps, {speed}"
        last, mean, accuracy = self.recent[-1], self.mean_loss(), self.accuracy()
        if mean is not None:
            loss = "–" if last.loss is None else f"{last.loss:.4f}"
            yield f"loss    {loss}, mean of the last {len(self.recent)}: {mean:.4f}"
        if accuracy is not None:
            yield f"        {accuracy:.1%} of next tokens right, given true context"
        if self.held_out is not None:
            yield f"held out {held_out_line(self.held_out)}"
        total = (self.target_s + self.wire_s + self.train_s) or 1.0
        parts = {"target": self.target_s, "wire": self.wire_s, "trainer": self.train_s}
        split = ", ".join(f"{name} {spent / total:.0%}" for name, spent in parts.items())
        yield f"went to {split}: {bound(*parts.values())}-bound"
        yield f"memory  {memory}"
        if self.shared or self.in_share:
            own = self.batches - self.shared - self.replayed
            yield f"shared  {self.batches:,} batches from {own:,} forwards of its own and {self.shared:,} of others"
        if self.replayed:
            yield f"replay  {self.replayed:,} of {self.batches:,} batches needed no forward: daemons had kept them"
        if self.reconnects or self.resubmitted:
            yield f"faults  {self.reconnects} reconnects, {self.resubmitted} batches asked for again"


def held_out_line(found: Measurement) -> str:
    """What held-out rows show, in few words."""
    loss = "no loss" if found.loss is None else f"loss {found.loss:.4f}"
    accuracy = "" if found.teacher_forced_accuracy is None else f", {found.teacher_forced_accuracy:.1%} right"
    accepted = "" if found.acceptance_length is None else f", acceptance {found.acceptance_length:.2f}"
    best = ""
    if found.best_loss is not None:
        best = ", the best yet" if found.best else f", best {found.best_loss:.4f} at {found.best_step:,}"
    return f"{loss}{accuracy}{accepted} at step {found.step:,}{best}"


def memory_use(device: str) -> str:
    """The memory of this process: most of its GPU's that torch held, and what is resident on the host."""
    parts = []
    if device.startswith("cuda"):
        import torch

        whole = torch.cuda.get_device_properties(device).total_memory
        peak = torch.cuda.max_memory_allocated(device)
        parts.append(f"GPU {units.size(peak)} of {units.size(whole)} at most")
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return ", ".join([*parts, f"host {units.size(pages * os.sysconf('SC_PAGE_SIZE'))}"])


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
