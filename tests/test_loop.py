"""The training loop, with a tiny objective and a source that makes its states up from the tokens."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from specd.config import TrainConfig
from specd.errors import BatchError, CheckpointError, SpecdError
from specd.metrics import Stats
from specd.packing import Batch
from specd.train.checkpoint import Checkpoints, Identity, Position
from specd.train.interrupt import Interrupt
from specd.train.journal import StepRecord, read
from specd.train.loop import learning_rate, total_steps, train

HIDDEN = 6


@dataclass
class TinyLoss:
    sum: torch.Tensor
    weight: torch.Tensor
    metrics: dict[str, torch.Tensor]


class Tiny:
    """Regression of a token's state on its id; predicts nothing where the loss mask is empty."""

    def __init__(self, poison: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.module = torch.nn.Sequential(torch.nn.Linear(HIDDEN, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.poison = poison
        self.trained: list[tuple[int, int]] = []

    def spec_for(self, contract: Any) -> Any:
        raise NotImplementedError

    def export(self, path: Path) -> None:
        raise NotImplementedError

    def loss(self, delivery: Any) -> TinyLoss:
        batch: Batch = delivery.batch
        self.trained.append((batch.epoch, batch.index))
        mask = torch.from_numpy(batch.loss_mask)
        wanted = torch.from_numpy(batch.tokens).float() / 50
        error = (self.module(delivery.taps.flatten(1))[:, 0] - wanted)[mask]
        total = (error**2).sum()
        if batch.samples[0] == self.poison:
            total = total * float("nan")
        right = torch.stack([(error.abs() < 0.5).sum(), torch.zeros((), dtype=torch.long)])
        metrics = {"correct": right, "counted": torch.stack([mask.sum(), mask.sum() * 0])}
        return TinyLoss(total, mask.sum(), metrics)


class Plan:
    """`per_epoch` batches an epoch; batch i holds sample i, or as many as `size` says."""

    def __init__(self, epochs: int = 2, per_epoch: int = 10, size: int = 1, empty: tuple[int, ...] = ()) -> None:
        self.epochs, self.per_epoch, self.size, self.empty = epochs, per_epoch, size, empty

    @property
    def num_batches(self) -> int:
        return self.epochs * self.per_epoch

    def batches(self, epoch: int, index: int) -> Iterator[Batch]:
        for number in range(epoch * self.per_epoch + index, self.num_batches):
            epoch, index = divmod(number, self.per_epoch)
            yield self.batch(epoch, index)

    def batch(self, epoch: int, index: int) -> Batch:
        samples = range(index * self.size, (index + 1) * self.size)
        tokens = np.concatenate([np.arange(3 + s % 4, dtype=np.int32) * 3 + s + epoch for s in samples])
        return Batch(
            tokens=tokens,
            lengths=np.array([3 + s % 4 for s in samples], dtype=np.int32),
            loss_mask=np.full(tokens.size, index not in self.empty),
            samples=tuple(samples),
            epoch=epoch,
            index=index,
        )


class Source:
    """States are a function of the token ids. `on_batch` is called before each delivery."""

    def __init__(self, on_batch: Callable[[Batch], None] = lambda batch: None, short: int = 0) -> None:
        self.on_batch, self.short = on_batch, short
        self.delivered = 0

    def stream(self, batches: Iterable[Batch]) -> Iterator[Any]:
        for batch in batches:
            if self.short and self.delivered == self.short:
                return
            self.on_batch(batch)
            self.delivered += 1
            angles = torch.from_numpy(batch.tokens).float()[:, None] * torch.arange(1, HIDDEN + 1) / 9
            yield SimpleNamespace(batch=batch, taps=angles.sin()[:, None, :], final=None)

    def stats(self) -> Stats:
        return Stats(busy_slots=1, num_slots=4, resubmitted=self.delivered)


CONFIG = TrainConfig(lr=0.02, weight_decay=0.01, accumulation=3, save_every=2, keep=2, warmup_ratio=0.1)


def run(
    directory: Path,
    config: TrainConfig = CONFIG,
    objective: Tiny | None = None,
    plan: Plan | None = None,
    source: Source | None = None,
    **options: Any,
) -> tuple[Tiny, Position]:
    torch.set_num_threads(1)
    objective = objective or Tiny()
    checkpoints = Checkpoints(
        directory / "checkpoints", Identity(target="t", settings={"train.lr": config.lr}), config.keep
    )
    position = train(
        config, objective, plan or Plan(), source or Source(), checkpoints, directory / "metrics.jsonl", **options
    )
    return objective, position


def records(directory: Path) -> list[StepRecord]:
    return read(directory / "metrics.jsonl")


def curve(directory: Path) -> list[tuple[float | None, float | None, float]]:
    return [(record.loss, record.grad_norm, record.lr) for record in records(directory)]


def weights(objective: Tiny) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in objective.module.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_every_batch_is_trained_once_and_the_last_window_is_flushed(tmp_path: Path) -> None:
    objective, position = run(tmp_path)
    lines = records(tmp_path)
    trained = [(batch.epoch, batch.index) for record in lines for batch in record.batches]
    assert trained == [(epoch, index) for epoch in range(2) for index in range(10)] == objective.trained
    assert [len(record.batches) for record in lines] == [3] * 6 + [2]
    assert position == Position(step=7, epoch=1, index=10)
    assert [record.step for record in lines] == list(range(1, 8))
    losses = [record.loss for record in lines if record.loss is not None]
    assert len(losses) == 7
    assert losses[-1] < losses[0]
    assert sum(record.resubmitted for record in lines) == 20, "counters are differences, not running sums"
    assert lines[0].teacher_forced_by_offset[1] is None, "an offset that was never predicted has no accuracy"


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


@pytest.mark.parametrize("at", [(0, 5), (0, 8), (1, 2), (1, 9)])
def test_resume_after_a_kill_continues_bit_for_bit(tmp_path: Path, at: tuple[int, int]) -> None:
    whole, _ = run(tmp_path / "whole")

    def kill(batch: Batch) -> None:
        if (batch.epoch, batch.index) == at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "cut", source=Source(kill))
    torch.manual_seed(123)
    resumed, _ = run(tmp_path / "cut", resume=bool(list((tmp_path / "cut" / "checkpoints").glob("step-*"))))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert same(weights(resumed), weights(whole))
    trained = [(batch.epoch, batch.index) for record in records(tmp_path / "cut") for batch in record.batches]
    assert trained == [(epoch, index) for epoch in range(2) for index in range(10)]


def test_a_torn_last_line_is_cut_off_on_resume(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    run(tmp_path / "cut", source=None)
    path = tmp_path / "cut" / "metrics.jsonl"
    for step in (6, 7):
        checkpoint = tmp_path / "cut" / "checkpoints" / f"step-{step:08d}"
        if step == 7:
            (checkpoint / "state.json").unlink()
    path.write_bytes(path.read_bytes()[:-9])
    run(tmp_path / "cut", resume=True)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_accumulation_equals_one_big_batch(tmp_path: Path) -> None:
    config = TrainConfig(lr=0.02, clip=0.05)
    small, _ = run(tmp_path / "a", TrainConfig(lr=0.02, clip=0.05, accumulation=5), plan=Plan(per_epoch=10))
    large, _ = run(tmp_path / "b", config, plan=Plan(per_epoch=2, size=5))
    for one, other in zip(weights(small), weights(large), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for first, second in zip(records(tmp_path / "a"), records(tmp_path / "b"), strict=True):
        assert first.loss == pytest.approx(second.loss, rel=1e-5)
        assert first.weight == second.weight
        assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-4)


def test_clipping_bounds_the_gradient_and_the_log_shows_it_unclipped(tmp_path: Path) -> None:
    run(tmp_path / "a", TrainConfig(lr=0.02, clip=1e-3, max_steps=1))
    run(tmp_path / "b", TrainConfig(lr=0.02, clip=0.0, max_steps=1))
    assert records(tmp_path / "a")[0].grad_norm == records(tmp_path / "b")[0].grad_norm
    norms = []
    for name in "ab":
        tensors = load_file(next((tmp_path / name / "checkpoints").glob("step-*")) / "optimizer.safetensors")
        first = [tensor for key, tensor in tensors.items() if key.startswith("adam.exp_avg.")]
        norms.append(math.sqrt(sum(float((tensor / 0.1).square().sum()) for tensor in first)))
    assert norms[0] == pytest.approx(1e-3, rel=1e-2)
    assert norms[1] == pytest.approx(records(tmp_path / "b")[0].grad_norm, rel=1e-4)


def test_a_step_without_weight_changes_nothing_and_still_counts(tmp_path: Path) -> None:
    seen: list[list[torch.Tensor]] = []
    objective = Tiny()
    source = Source(lambda batch: seen.append(weights(objective)))
    config = TrainConfig(lr=0.02, weight_decay=0.5, epochs=1)
    _, position = run(tmp_path, config, objective, Plan(epochs=1, per_epoch=5, empty=(2,)), source)
    assert position == Position(step=5, epoch=0, index=5)
    assert same(seen[2], seen[3]), "neither momentum nor weight decay may move the weights"
    assert not same(seen[3], seen[4])
    lines = records(tmp_path)
    assert (lines[2].loss, lines[2].weight, lines[2].teacher_forced_accuracy) == (None, 0.0, None)
    assert all(record.loss is not None for record in lines if record.step != 3)


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_non_finite_loss_names_its_batch_before_weights_see_it(tmp_path: Path, log_every: int) -> None:
    config = TrainConfig(lr=0.02, log_every=log_every, save_every=0)
    good, bad = Tiny(), Tiny(poison=4)
    with pytest.raises(BatchError):
        run(tmp_path / "good", config, good, Plan(epochs=1), Source(short=4))
    with pytest.raises(SpecdError, match=r"step 5: the loss is nan in batch 4 of epoch 0 \(samples 4\).*step 4"):
        run(tmp_path / "bad", config, bad, Plan(epochs=1, per_epoch=10))
    assert same(weights(bad), weights(good)), "neither the bad step nor those after it may touch a weight"
    assert [record.step for record in records(tmp_path / "bad")] == [1, 2, 3, 4]
    assert not list((tmp_path / "bad").glob("checkpoints/step-*"))


def test_the_final_checkpoint_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    save = Checkpoints.save

    def spy(self: Checkpoints, position: Position, *rest: Any) -> Path:
        written.append(position.step)
        return save(self, position, *rest)

    monkeypatch.setattr(Checkpoints, "save", spy)
    run(tmp_path / "coincides", TrainConfig(lr=0.02, save_every=5, max_steps=10))
    assert written == [5, 10]
    written.clear()
    run(tmp_path / "beyond", TrainConfig(lr=0.02, save_every=4, max_steps=6))
    assert written == [4, 6]
    written.clear()
    run(tmp_path / "never", TrainConfig(lr=0.02, save_every=0, max_steps=3))
    assert written == [3]


def test_max_steps_asks_for_no_batch_that_it_does_not_train(tmp_path: Path) -> None:
    source = Source()
    run(tmp_path, TrainConfig(accumulation=3, max_steps=2), source=source)
    assert source.delivered == 6
    assert total_steps(TrainConfig(accumulation=3, max_steps=100), 20) == 7


def test_resuming_a_finished_run_trains_nothing(tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    source = Source()
    _, position = run(tmp_path, source=source, resume=True)
    assert (position.step, source.delivered) == (7, 0)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_the_last_step(tmp_path: Path, number: signal.Signals) -> None:
    run(tmp_path / "whole")

    def interrupted(batch: Batch) -> None:
        if (batch.epoch, batch.index) == (0, 4):
            os.kill(os.getpid(), number)

    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", source=Source(interrupted), interrupt=interrupt)
        assert interrupt.received == number
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000001"]
    run(tmp_path / "cut", resume=True)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_signal_inside_a_step_waits_for_its_end(tmp_path: Path) -> None:
    class Stopper:
        def step(self, record: StepRecord) -> None:
            if record.step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with Interrupt() as interrupt, pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupt=interrupt, sinks=[Stopper()])
    assert [record.step for record in records(tmp_path)] == [1, 2, 3]
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()


def test_a_source_that_ends_early_is_an_error_and_resumable(tmp_path: Path) -> None:
    with pytest.raises(BatchError, match="13 batches early, after step 2"):
        run(tmp_path, source=Source(short=7))
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_resume_without_the_journal_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="ends at step 0, the checkpoint is at step 7"):
        run(tmp_path, resume=True)


def test_log_every_changes_the_log_but_no_number(tmp_path: Path) -> None:
    run(tmp_path / "each")
    run(tmp_path / "some", TrainConfig(**{**_fields(CONFIG), "log_every": 5}))
    assert curve(tmp_path / "each") == curve(tmp_path / "some")


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = TrainConfig(lr=1.0, warmup_ratio=0.1)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def _fields(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__struct_fields__}
