"""The trainer's side of the pipeline benchmark: steps that train or sleep, and the clock around them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from specd.bench.made_up import MadeUp, made_up
from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.rows import row_of
from specd.bench.pipeline.settings import SleepConfig, batches
from specd.bench.pipeline.step import OptimizerStep, SleepingStep, clock, given, make_step
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import embedded
from specd.metrics import Stats
from specd.protocol.batch import Delivery
from specd.protocol.capture import CaptureSpec
from specd.targets.registry import load_target

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})


@pytest.mark.parametrize("draft", ["dflash", "eagle3"])
def test_a_real_draft_learns_on_given_states(draft: str) -> None:
    target = load_target(TargetConfig(model=TINY))
    settings = defaults(True, 1, TINY, {"draft": draft})
    step = make_step(settings, target.contract, lambda name: bytes(target.artifact(name)), "cpu")
    assert isinstance(step, OptimizerStep)
    before = [parameter.detach().clone() for parameter in step.parameters]
    states = made_up(settings.capture(target.contract), 256, 32, "cpu")
    clocked = clock(given(batches(settings, "fixed", 64, 4, 1), states), step, 1)
    assert (len(clocked.seconds), clocked.samples, clocked.tokens) == (3, 12, 3 * 256)
    changed = [not torch.equal(old, new) for old, new in zip(before, step.parameters, strict=True)]
    assert all(changed)


def test_a_draft_that_chooses_a_vocabulary_gets_one() -> None:
    target = load_target(TargetConfig(model=TINY))
    settings = defaults(True, 1, TINY, {"draft": "eagle3", "draft_config": {"num_steps": 2, "draft_vocab_size": 16}})
    step = make_step(settings, target.contract, lambda name: bytes(target.artifact(name)), "cpu")
    assert 16 * 32 in [parameter.numel() for parameter in step.parameters]


@pytest.mark.parametrize("steps", [None, 3])
def test_the_clock_leaves_warm_up_out_and_what_comes_behind(steps: int | None) -> None:
    """The target is at work until the last iteration that is timed."""
    drawn = batches(SETTINGS, "fixed", 64, 5 if steps is None else 8, 1)
    seen: list[int] = []

    def coming() -> Iterator[Delivery]:
        for batch in drawn:
            seen.append(batch.index)
            yield Delivery(batch, None)

    clocked = clock(coming(), None, 2, stats=lambda: Stats(batches=len(seen), transports={"a": "b"}), steps=steps)
    assert seen == list(range(len(drawn)))
    assert (len(clocked.seconds), clocked.tokens, clocked.stats) == (
        3,
        3 * 256,
        Stats(batches=3, transports={"a": "b"}),
    )


def test_figures_are_those_of_the_batches_that_were_timed() -> None:
    """What came ahead during warm-up was computed and fetched before the clock began, and counts all the same."""
    target = TargetConfig(model=f"{TINY},ms=10", exact=True)
    config = DaemonConfig(target=target, ring=RingConfig(slots=6, slot_tokens=256))
    with embedded(config) as host:
        link = SubscriberConfig(endpoints=(host.endpoint,), transport="inproc", depth=4)
        with Subscriber(link, CaptureSpec(taps=(1,), dtype="float32"), context=host.context) as subscriber:
            drawn = batches(SETTINGS, "fixed", 64, 10, 1)
            clocked = clock(subscriber.stream(drawn), SleepingStep(SleepConfig(ms=15)), 6, True,
                            subscriber.stats)  # fmt: skip
    stats = clocked.stats
    assert (stats.batches, stats.nbytes) == (4, 4 * 256 * 32 * 4)
    assert stats.forward_s >= 4 * 0.010
    assert row_of("disaggregated", "fixed", 4, "inproc", 2, clocked).forward_ms == round(stats.forward_s / 4 * 1e3, 3)
    assert stats.fetch_s > 0


@pytest.mark.parametrize(("overlap", "waited"), [(True, [0, 1, 2]), (False, [0, 1, 2, 3])])
def test_without_overlap_a_step_ends_when_it_is_done(
    overlap: bool, waited: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device comes to a point after each step; whether the last one is waited for, too, depends on the depth."""
    target = load_target(TargetConfig(model=TINY))
    settings = msgspec.structs.replace(SETTINGS, draft="dflash")
    step = make_step(settings, target.contract, lambda name: bytes(target.artifact(name)), "cpu")
    points = iter(range(4))
    found: list[int] = []

    def reached(device: str) -> Any:
        number = next(points)
        return SimpleNamespace(synchronize=lambda: found.append(number))

    monkeypatch.setattr("specd.bench.pipeline.step.reached", reached)
    clock(given(batches(settings, "fixed", 64, 4, 1), MadeUp(torch.randn(256, 3, 32))), step, 1, overlap)
    assert found == waited
