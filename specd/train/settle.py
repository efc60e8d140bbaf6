"""Settings of a run as a function of its target's name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from specd.config.load import convert
from specd.config.presets import run_config
from specd.config.settings import RunConfig
from specd.errors import ConfigError

Settle = Callable[[str], RunConfig]
"""A run's settings, given the name of its target: recipes go by that name."""


def as_function(config: RunConfig | Mapping[str, Any] | Settle) -> Settle:
    """`config` as a function of the target's name. Raises ConfigError for what is no settings of a run."""
    if callable(config):
        return config
    if not isinstance(config, RunConfig | Mapping):
        raise ConfigError(f"config is {config!r}: expected a RunConfig, a mapping of its settings, or a function")
    try:
        data = msgspec.to_builtins(config if isinstance(config, RunConfig) else dict(config), enc_hook=os.fspath)
    except TypeError as error:
        raise ConfigError(f"settings: {error}; expected numbers, strings, paths, lists and mappings") from None
    checked = convert(data, RunConfig, "settings")
    if checked.target:
        raise ConfigError(
            f"settings: target={checked.target}: expected none, as the target is hosted already; give them to whoever "
            f"hosts it: `specd start`, or the DaemonConfig of `specd.embedded`"
        )
    return (lambda target: checked) if isinstance(config, RunConfig) else partial(run_config, data)
