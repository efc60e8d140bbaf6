"""A draft that another run begins with: where it is, what of it must fit, and how it is named afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specd.drafts.directory import digest, draft_directory, read_config, weight_files
from specd.errors import ConfigError

FACT = "initial weights"
"""The name of what `provenance` says, among the facts of a run."""


def initial_config(init: str) -> tuple[dict[str, Any], Path]:
    """config.json and directory of the draft that the setting `init` names. Raises CheckpointError where none is."""
    path = draft_directory(init)
    config = read_config(path)
    weight_files(path)
    return config, path


def same_shape(found: Mapping[str, Any], asked: Mapping[str, Any], settings: Mapping[str, str], init: str) -> None:
    """Raise ConfigError where a draft differs from what a run asks for.

    settings: what must be equal -> the setting that says it, empty where that is the target.
    """
    for name, setting in settings.items():
        if found[name] != asked[name]:
            remedy = f"change {setting}" if setting else "it is a draft for another target"
            raise ConfigError(
                f"draft.init={init!r}: its {name} is {found[name]!r}, expected this run's {asked[name]!r}: {remedy}, "
                f"or leave draft.init out"
            )


def provenance(init: str) -> str:
    """What a run's facts say of the draft it began with: the directory, and the digest of its content."""
    path = draft_directory(init)
    return f"{path} (sha256 {digest(path)})"


def began_with(init: str, fact: str) -> Path:
    """The draft that a run began with. fact: what `provenance` said then.

    Raises ConfigError when it is another one by now, CheckpointError when it is gone.
    """
    path = draft_directory(init)
    if (now := digest(path)) not in fact:
        raise ConfigError(
            f"draft.init={init!r}: expected the draft that the run began with, {fact or 'of which it says nothing'}, "
            f"but its sha256 is {now}; put that one back"
        )
    return path
