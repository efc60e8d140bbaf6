"""The structs of all settings: frozen, and one clear message for every value that does not fit."""

from __future__ import annotations

from typing import Any

import pytest

from specd.config.load import convert, overrides
from specd.config.settings import (
    CaptureConfig,
    DaemonConfig,
    RingConfig,
    RunConfig,
    TargetConfig,
)
from specd.errors import ConfigError


def test_a_run_takes_any_overrides_of_a_hosted_target() -> None:
    run = convert(overrides(["method=x", "target.exact=true", "target.dtype=bfloat16"]), RunConfig, "settings")
    assert run.target == {"exact": True, "dtype": "bfloat16"}
    assert RunConfig(method="x").target == {}, "daemons have settings of their own"


def test_configuration_is_frozen() -> None:
    with pytest.raises(AttributeError):
        RingConfig().slots = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        ({"ring": {"slot": 3}}, DaemonConfig, "conf: Object contains unknown field `slot` - at `$.ring`"),
        ({"learning_rate": 1}, RunConfig, "conf: Object contains unknown field `learning_rate`"),
        ({"target": [1]}, RunConfig, "conf: Expected `object`, got `array` - at `$.target`"),
        ({}, TargetConfig, "conf: Object missing required field `model`"),
        (
            {"model": "m", "load_format": "x"},
            TargetConfig,
            "conf: Invalid enum value 'x', expected one of auto, dummy - at `$.load_format`",
        ),
        ({"slots": "many"}, RingConfig, "conf: Expected `int`, got `str` - at `$.slots`"),
        ({"slots": 1.5}, RingConfig, r"conf: Expected `int`, got `float` - at `$.slots`"),
        ({"final": 1}, CaptureConfig, "conf: Expected `bool`, got `int` - at `$.final`"),
        ([], RingConfig, "conf: Expected `object`, got `array`"),
        ({"train": {"log_every": 0}}, RunConfig, "conf: Expected `int` >= 1, got 0 - at `$.train.log_every`"),
        ({"train": {"accumulation": 0}}, RunConfig, "conf: Expected `int` >= 1, got 0 - at `$.train.accumulation`"),
        ({"train": {"lr": -1}}, RunConfig, "conf: Expected `float` > 0.0, got -1 - at `$.train.lr`"),
        ({"train": {"lr": float("nan")}}, RunConfig, "conf: Expected `float` > 0.0, got nan - at `$.train.lr`"),
        ({"train": {"betas": [0.9, 1.5]}}, RunConfig, "conf: Expected `float` < 1.0, got 1.5 - at `$.train.betas[1]`"),
        ({"train": {"threads": -1}}, RunConfig, "conf: Expected `int` >= 0, got -1 - at `$.train.threads`"),
        ({"train": {"max_steps": -1}}, RunConfig, "conf: Expected `int` >= 0, got -1 - at `$.train.max_steps`"),
        ({"train": {"warmup_ratio": 2}}, RunConfig, "conf: Expected `float` <= 1.0, got 2 - at `$.train.warmup_ratio`"),
        ({"train": {}}, RunConfig, "conf: Object missing required field `method`"),
        ({"data": {"batch_tokens": 0}}, RunConfig, "conf: Expected `int` >= 1, got 0 - at `$.data.batch_tokens`"),
        ({"model": "m", "num_layers": -1}, TargetConfig, "conf: Expected `int` >= 0, got -1 - at `$.num_layers`"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data: Any, kind: type[Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        convert(data, kind, "conf")
    assert message in str(caught.value)
