"""The suite for drafts can fail: each of these drafts breaks one promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from specd.config.settings import CaptureConfig, Config
from specd.drafts.base import Loss, Method, Objective
from specd.drafts.dflash.method import DFlashMethod
from specd.drafts.dflash.settings import DFlashConfig
from specd.drafts.suite import DraftConformance
from specd.protocol.batch import Delivery

SETTINGS = DFlashConfig(num_layers=1, num_taps=2, block_size=4, num_anchors=5, loss_chunk=7, mask_token_id=3)


def altered(change: Callable[[Loss], Loss]) -> type[Method]:
    """DFlash, whose loss is `change`d."""

    class Changed(DFlashMethod):
        @classmethod
        def objective(cls, *arguments: Any, **options: Any) -> Any:
            objective = super().objective(*arguments, **options)
            loss = objective.loss

            def changed(delivery: Delivery) -> Loss:
                return change(loss(delivery))

            objective.loss = changed  # type: ignore[method-assign]
            return objective

    return Changed


class TooSmall(DFlashMethod):
    @classmethod
    def capture_config(cls, settings: Any) -> CaptureConfig:
        return CaptureConfig(num_taps=1)


class TooFew(DFlashMethod):
    consecutive_labels: ClassVar[int] = 6


def suite(kind: type[Method]) -> DraftConformance:
    class Suite(DraftConformance):
        method: ClassVar[type[Method]] = kind
        settings: ClassVar[Config] = SETTINGS

    return Suite()


def test_slots_of_another_size() -> None:
    with pytest.raises(AssertionError, match="slots would have another size"):
        suite(TooSmall).test_it_captures_what_the_target_has()


def test_a_mean_in_place_of_a_sum() -> None:
    mean = altered(lambda loss: loss._replace(sum=loss.sum / loss.weight.clamp(min=1)))
    with pytest.raises(AssertionError, match="Scalars are not close"):
        suite(mean).test_a_loss_is_the_sum_of_its_sequences()


def test_a_draw_from_the_global_generator() -> None:
    noisy = altered(lambda loss: loss._replace(sum=loss.sum * (1 + 0.1 * torch.rand(()))))
    with pytest.raises(AssertionError):
        suite(noisy).test_every_parameter_is_trained_and_the_same_seed_gives_the_same_bits()


def test_a_parameter_that_is_never_trained() -> None:
    class Idle(DraftConformance):
        method: ClassVar[type[Method]] = DFlashMethod
        settings: ClassVar[Config] = SETTINGS

        def objective(self, seed: int = 0) -> Objective:
            found = super().objective(seed)
            found.module.register_parameter("idle", torch.nn.Parameter(torch.zeros(2)))
            return found

    with pytest.raises(AssertionError, match="a parameter has no gradient"):
        Idle().test_every_parameter_is_trained_and_the_same_seed_gives_the_same_bits()


def test_samples_that_could_be_trained_and_are_left_out() -> None:
    with pytest.raises(AssertionError):
        suite(TooFew).test_a_batch_without_a_prediction_weighs_nothing("too few in a row")
