"""The training loop: what it trains, what it saves, and how it goes on."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec import structs
from safetensors.torch import load_file
from torch.optim.adamw import adamw

from runs import CONFIG, Plan, Source, Tiny, curve, records, run, same, weights
from specd.config.settings import TrainConfig
from specd.data.batching import Place
from specd.drafts.base import Loss
from specd.errors import BatchError, CheckpointError, SpecdError
from specd.protocol.batch import Batch
from specd.train import measurement
from specd.train.checkpoint import Checkpoints, Position
from specd.train.optimizer import learning_rate, total_steps
from specd.train.validation import Validation


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
    twice = [(2 * share if share is not None else None) for share in lines[-1].teacher_forced_by_offset]
    assert list(lines[-1].by_offset["twice"]) == twice, "what else a draft measures"


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


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("at", [(0, 1), (0, 4), (1, 1)])
def test_out_of_memory_names_the_batch_and_loses_no_step(tmp_path: Path, at: tuple[int, int], log_every: int) -> None:
    class OutOfMemory(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, total: torch.Tensor) -> torch.Tensor:
            return total.clone()

        @staticmethod
        def backward(ctx: Any, *grad: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    class Big(Tiny):
        """Half of its gradients are made when the batch `at` runs out of memory."""

        def loss(self, delivery: Any) -> Loss:
            loss = super().loss(delivery)
            if (delivery.batch.epoch, delivery.batch.index) == at:
                bias = self.module[2].bias
                loss.sum.backward(inputs=[bias], retain_graph=True)  # type: ignore[no-untyped-call]
                return loss._replace(sum=OutOfMemory.apply(loss.sum))  # type: ignore[no-untyped-call]
            return loss

    run(tmp_path / "whole")
    config = structs.replace(CONFIG, log_every=log_every, save_every=0)
    done = (at[0] * 10 + at[1]) // 3
    said = (
        rf"step {done + 1}: no memory left for batch {at[1]} of epoch {at[0]} \(1 sequences, (\d) tokens, \1 of them "
        r"labels\): CUDA out of memory\. .* 2\.00 GiB\.; .*specd resume.*data\.max_batch_sequences.*data\.batch_tokens"
    )
    with pytest.raises(SpecdError, match=said) as refused:
        run(tmp_path / "cut", config, Big())
    assert "draft." not in str(refused.value), "settings of one draft are no remedy for another"
    assert [record.step for record in records(tmp_path / "cut")] == list(range(1, done + 1))
    saved = [path.name for path in (tmp_path / "cut").glob("checkpoints/*")]
    assert saved == ([f"step-{done:08d}"] if done else [])
    run(tmp_path / "cut", config, resume=bool(done))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_an_update_that_was_cut_short_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole")
    update, calls = adamw, 0

    def fails_late(*tensors: Any, **settings: Any) -> None:
        nonlocal calls
        calls += 1
        update(*tensors, **settings)
        if calls == 8:  # a step updates matrices, then vectors
            raise torch.OutOfMemoryError("CUDA out of memory.")

    said = "step 4: no memory left for batch 1 of epoch 1"
    with monkeypatch.context() as patched:
        patched.setattr("specd.train.optimizer.adamw", fails_late)
        with pytest.raises(SpecdError, match=said):
            run(tmp_path / "cut")
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-00000002"]
    resumed, _ = run(tmp_path / "cut", resume=True)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert same(weights(resumed), weights(whole))


def test_a_failing_sink_does_not_prevent_the_checkpoint(tmp_path: Path) -> None:
    class Gone:
        def step(self, record: object) -> None:
            raise OSError(5, "the terminal is gone")

        def validated(self, found: object) -> None:
            raise NotImplementedError

    def interrupt(batch: Batch) -> None:
        if (batch.epoch, batch.index) == (0, 7):
            raise KeyboardInterrupt

    config = structs.replace(CONFIG, log_every=50, save_every=0)
    with pytest.raises(OSError, match="gone"):
        run(tmp_path, config, source=Source(interrupt), sinks=[Gone()])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert [record.step for record in records(tmp_path)] == [1, 2]


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
    run(tmp_path / "some", structs.replace(CONFIG, log_every=5))
    assert curve(tmp_path / "each") == curve(tmp_path / "some")


def test_draft_s_counts_all_batches_of_a_step_and_no_wait(tmp_path: Path) -> None:
    class Slow(Tiny):
        def loss(self, delivery: Any) -> Loss:
            time.sleep(0.02)
            return super().loss(delivery)

    run(tmp_path, objective=Slow(), source=Source(lambda batch: time.sleep(0.03)))
    lines = records(tmp_path)
    for record in lines:
        assert record.draft_s >= 0.02 * len(record.batches)
        assert record.step_s - record.draft_s >= 0.03 * len(record.batches) - 0.001


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = TrainConfig(lr=1.0, warmup_ratio=0.1)
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("log_every", [1, 2])
def test_a_run_ends_when_its_time_is_over_and_its_rate_has_come_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int
) -> None:
    now = 0.0

    def take(batch: Batch) -> None:
        nonlocal now
        now += 1.0
        if killed is not None and (batch.epoch, batch.index) == killed:
            raise Killed

    monkeypatch.setattr("specd.train.loop.time", SimpleNamespace(perf_counter=lambda: now))
    config = structs.replace(CONFIG, epochs=20, max_minutes=0.5, log_every=log_every, save_every=2)
    killed: tuple[int, int] | None = None
    held = [Place(0, 0, (11,), 6), Place(0, 1, (12,), 3)]
    checks = Validation(held, 1000, 0, tmp_path / "validation.jsonl")
    whole, end = run(tmp_path / "whole", config, plan=Plan(20), source=Source(take), validation=checks)
    assert end == Position(step=10, epoch=2, index=10), "30 s are 10 steps of 3 batches, of 67"
    assert [record.step_s for record in records(tmp_path / "whole")] == [3.0] * 10
    rates = [record.lr for record in records(tmp_path / "whole")]
    assert rates[0] < 0.2 * config.lr < 0.9 * config.lr < max(rates)
    assert rates[-1] < 0.12 * config.lr, "as behind nine tenths of a plan, or eight"
    assert [(one.step, one.tokens) for one in measurement.read(tmp_path / "validation.jsonl")] == [(10, 9)]

    killed = (1, 5)
    with pytest.raises(Killed):
        run(tmp_path / "cut", config, plan=Plan(20), source=Source(take))
    killed = None
    resumed, again = run(tmp_path / "cut", config, plan=Plan(20), source=Source(take), resume=True)
    assert again == end, "the clock goes on where it was"
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert same(weights(resumed), weights(whole))
    source = Source(take)
    assert run(tmp_path / "cut", config, plan=Plan(20), source=source, resume=True)[1] == end
    assert source.delivered == 0, "it is over"
    longer = structs.replace(config, max_minutes=0.6)
    assert run(tmp_path / "cut", longer, plan=Plan(20), source=Source(take), resume=True)[1].step == 12
