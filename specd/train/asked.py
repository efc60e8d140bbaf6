"""What is asked of a run, as settings, and what of it can be checked before its target is known."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from specd.client.handshake import no_borrowing
from specd.config.load import convert
from specd.config.presets import run_config
from specd.config.settings import Config, RunConfig
from specd.data import dataset as datasets
from specd.data.rows import DEMO
from specd.drafts import registry
from specd.drafts.initial import initial_config
from specd.errors import ConfigError, SpecdError
from specd.protocol.capture import CaptureSpec
from specd.train import launcher
from specd.train.directory import RunDirectory, fixed
from specd.train.launcher import Launch
from specd.train.preparation import kept, with_dtype
from specd.train.sinks import check as check_log
from specd.transports import registry as transports

Settle = Callable[[str], RunConfig]
"""A run's settings, given the name of its target: recipes go by that name."""


def by_target(config: RunConfig | Mapping[str, Any] | Settle) -> Settle:
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


def output_of(config: RunConfig) -> RunDirectory:
    """The run's directory."""
    return RunDirectory(Path(config.output or f"runs/{config.method}"))


def check(config: RunConfig, launch: Launch | None = None) -> str:
    """See that a run can begin, whatever its target; returns its device. Nothing is made yet.

    Raises ConfigError, DataError for data that is not there.
    """
    registry.settings(config.method, config.draft, "settings")
    check_log(config.log, (launch or Launch()).rank == 0)
    if config.data.path:
        datasets.check(config.data)
    if config.capture.dtype != "auto" and config.subscriber.borrow:
        raise ConfigError(no_borrowing(config.capture.dtype))
    if (asked := config.subscriber.transport) not in (known := ["auto", *transports.names()]):
        raise ConfigError(f"subscriber.transport={asked!r}: expected one of {', '.join(known)}; leave it out for auto")
    return launcher.device_of(config.train, launch or Launch())


def see_init(config: RunConfig) -> None:
    """Raise ConfigError or CheckpointError where the draft to begin with is not there; its shape is compared later."""
    if init := getattr(registry.settings(config.method, config.draft, "settings"), "init", ""):
        initial_config(init)


def is_finished(directory: RunDirectory, settle: Settle, device: str) -> bool:
    """Whether the run is finished and was made with these settings, as far as it shows without its target.

    Its data is known by its path here, and a target hosted here by its settings.
    """
    facts = directory.finished()
    if facts is None:
        return False
    try:
        first = convert(facts.config, RunConfig, "run.json")
        known = settle(str(facts.target["model"]))
        now = replace(with_dtype(known, device), data=replace(known.data, path=known.data.path or DEMO))
        now, draft = kept(now, registry.settings(now.method, now.draft, "settings"), first)
        free = registry.load(now.method).free
        old = fixed(first, registry.settings(first.method, first.draft, "settings"), free)
        new = fixed(now, draft, free)
    except (SpecdError, KeyError):  # whatever it is, a run that goes on says it better
        return False
    return (old, first.data.path, first.target) == (new, now.data.path, now.target)


def check_recipe(config: RunConfig, target: str) -> Config:
    """The draft's own settings for a target. Raises ConfigError for what cannot work, before anything is loaded."""
    draft = registry.settings(config.method, config.draft, "settings")
    registry.load(config.method).check(draft, target)
    datasets.check(config.data if config.data.path else replace(config.data, path=DEMO))
    return draft


def travelling(config: RunConfig, spec: CaptureSpec) -> CaptureSpec:
    """What is asked of a daemon for a draft that reads the states of `spec`."""
    return spec if config.capture.dtype == "auto" else replace(spec, dtype=config.capture.dtype)
