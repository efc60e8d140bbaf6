"""A run's metrics: sums of this process, the last step, and names that keep promtool's rules."""

from __future__ import annotations

from exposed import lint, page_of, promtool, samples
from specd.train.exposition import Exposition
from step_records import measurement, record


def test_sums_go_up_and_gauges_are_of_the_last_step() -> None:
    run = Exposition(40, {"method": "dflash", "target": "tiny"})
    for step in (11, 12):
        run.step(record(step, resubmitted=1))
    found = samples(page_of(run.metrics()))
    assert found['specd_train_info{method="dflash",target="tiny"}'] == 1
    assert found["specd_train_planned_steps"] == 40
    assert found["specd_train_steps_total"] == 2
    assert found["specd_train_step"] == 12
    assert found["specd_train_tokens_total"] == 1000
    assert found["specd_train_resubmitted_batches_total"] == 2
    assert found["specd_train_loss"] == 8.0 / 12
    assert {name: found[f'specd_train_seconds_total{{part="{name}"}}'] for name in ("target_wait", "train")} == {
        "target_wait": 3.0,
        "train": 0.8,
    }


def test_a_step_without_a_loss_and_a_run_without_a_step_have_none() -> None:
    run = Exposition(40, {})
    before = samples(page_of(run.metrics()))
    assert before["specd_train_steps_total"] == 0
    run.step(record(1, loss=None, grad_norm=None))
    after = samples(page_of(run.metrics()))
    assert "specd_train_loss" not in before.keys() | after.keys()
    assert after["specd_train_step"] == 1


def test_held_out_rows_are_gauges_of_the_last_measurement() -> None:
    run = Exposition(40, {})
    for found in (measurement(10), measurement(20)):
        run.validated(found)
    page = samples(page_of(run.metrics()))
    names = ("loss", "best_loss", "best_step", "step", "teacher_forced_accuracy")
    assert [page[f"specd_train_validation_{name}"] for name in names] == [2.75, 2.5, 10, 20, 0.25]


def test_names_keep_promtools_rules() -> None:
    run = Exposition(40, {})
    run.step(record(1))
    run.validated(measurement(1))
    page = page_of(run.metrics())
    assert lint(page) == promtool(page) == []
