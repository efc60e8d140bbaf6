"""What a run came to, at its end: whatever way it ends, and only if it did anything."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from specd.train.display import Display
from specd.train.journal import TrainedBatch
from specd.train.summary import Totals, memory_use
from step_records import measurement, record


def stop(console: Console) -> None:
    """A run that is interrupted after a step."""
    with Display("draft", 0, 9, dict, console) as display:
        display.step(record(1, reconnects=2, resubmitted=3))
        raise KeyboardInterrupt


def test_an_interrupted_run_is_summed_up_and_one_without_a_step_is_not() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=80)
    with pytest.raises(KeyboardInterrupt):
        stop(console)
    with Display("other", 0, 9, dict, console):
        pass
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert shown.count("tokens/s, 2.0 s a step") == 1
    assert "2 reconnects, 3 batches asked for again" in shown


def test_every_line_fits_80_columns() -> None:
    totals = Totals()
    for step in range(1, 60):
        totals.add(record(step, loss=123.45678, tokens=98_765_432, target_wait_s=900.0, step_s=1000.0))
    totals.held_out = measurement(59, loss=123.45678, best_loss=120.0, best_step=40)
    lines = list(totals.lines(123_456.0, "GPU 138.8 GiB of 139.8 GiB at most, host 123.4 GiB"))
    assert max(map(len, lines)) <= 80
    assert "held out loss 123.4568, 25.0% right at step 59, best 120.0000 at 40" in lines
    assert lines[0] == "time    34 h 17 min, 59 steps, 98,765 tokens/s, 16 min 40 s a step"
    assert lines[1] == "loss    123.4568, mean of the last 20: 123.4568"


def test_what_others_forwards_have_saved_is_said() -> None:
    totals = Totals()
    for step in range(1, 5):
        totals.add(record(step, shared=step % 2))
    batches = 4 * len(record(1).batches)
    assert f"shared  {batches} batches from {batches - 2} forwards of its own and 2 of others" in totals.lines(1.0, "")


def test_a_leader_of_a_share_says_that_all_forwards_were_its_own() -> None:
    alone, leader = Totals(), Totals(in_share=True)
    for totals in (alone, leader):
        totals.add(record(1))
    batches = len(record(1).batches)
    said = f"shared  {batches} batches from {batches} forwards of its own and 0 of others"
    assert said in leader.lines(1.0, "")
    assert not [line for line in alone.lines(1.0, "") if line.startswith("shared")]


def test_what_daemons_had_kept_is_said_of_each_epoch_and_of_all() -> None:
    totals = Totals()

    def add(step: int, epochs: tuple[int, ...], **changes: int) -> str:
        batches = tuple(TrainedBatch(epoch=epoch, index=step, samples=(step,)) for epoch in epochs)
        over = totals.add(record(step, epoch=epochs[-1], batches=batches, **changes))
        return str(over) if over else ""

    assert add(1, (0, 0)) == add(2, (0, 0), replayed=1) == ""
    assert add(3, (0, 1), replayed=1) == "epoch 1: 25% replayed, target 75%", "a step across its end counts for neither"
    add(4, (1, 1), replayed=2)
    add(5, (1, 1), replayed=1, shared=1)
    assert str(totals.epoch) == "epoch 2: 75% replayed, target 0%, forwards of others 25%"
    lines = list(totals.lines(1.0, ""))
    assert "replay  5 of 10 batches needed no forward: daemons had kept them" in lines
    assert "shared  10 batches from 4 forwards of its own and 1 of others" in lines


def test_a_run_that_learnt_nothing_has_no_loss_to_show() -> None:
    totals = Totals()
    totals.add(record(1, loss=None, teacher_forced_accuracy=None))
    assert not [line for line in totals.lines(1.0, "") if "loss" in line or "right" in line]


def test_the_memory_of_a_process_without_a_gpu_is_its_hosts() -> None:
    assert memory_use("cpu").startswith("host ")
    assert memory_use("cpu").endswith("iB")
