"""DSpark as the registry knows it: the suite for drafts, and what is refused."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec
import pytest

from dspark import CONFIG, make_dspark
from specd.config.settings import Config
from specd.drafts import registry
from specd.drafts.base import Method
from specd.drafts.dspark.method import DSparkMethod
from specd.drafts.suite import DraftConformance
from specd.errors import ConfigError


class TestDSpark(DraftConformance):
    method: ClassVar[type[Method]] = DSparkMethod
    settings: ClassVar[Config] = CONFIG


def test_a_window_that_no_engine_computes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"draft\.sliding_causal=true: expected false, as DSpark drafts are"):
        DSparkMethod.check(msgspec.structs.replace(CONFIG, sliding_window=9, sliding_causal=True), "tiny")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dpace"}, r"Invalid enum value 'dpace', expected one of decay - at `\$\.draft\.loss`"),
        ({"markov_rank": 0}, "markov_rank"),
    ],
)
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        registry.settings("dspark", settings, "a test")


def test_a_target_whose_distribution_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="it divides them by temper: a draft cannot learn its distribution"):
        make_dspark(figures={"odd_logits": "it divides them by temper"})
