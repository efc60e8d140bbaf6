"""The registry of drafts: which methods can be trained, and which one wrote a directory."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from specd.config.load import convert
from specd.config.settings import Config
from specd.drafts.directory import read_config
from specd.errors import CheckpointError, ConfigError
from specd.plugins import Family

if TYPE_CHECKING:
    from specd.drafts.base import Draft, Method

BUILTIN: dict[str, str] = {
    "dflash": "specd.drafts.dflash.method:DFlashMethod",
    "dflash2": "specd.drafts.dflash2.method:DFlash2Method",
    "dspark": "specd.drafts.dspark.method:DSparkMethod",
    "eagle3": "specd.drafts.eagle3.method:Eagle3Method",
}
DEFAULT = next(iter(BUILTIN))
"""The method where none is asked for."""
FAMILY = Family("draft method", BUILTIN, "specd.drafts", ConfigError)
names = FAMILY.names
FACTS = ("title", "settings", "free", "consecutive_labels", "architectures")


def load(name: str) -> type[Method]:
    """Import the method called `name`. Raises ConfigError that lists the known names, or says what failed."""
    found = FAMILY.load(name)
    if lost := [fact for fact in FACTS if not hasattr(found, fact)]:
        raise ConfigError(
            f"draft method {name!r} is {found!r}, without {', '.join(lost)}; see specd.drafts.base.Method"
        )
    kind, written = found.settings, found.architectures
    if not (isinstance(kind, type) and issubclass(kind, Config) and _are_names(written, tuple)):
        raise ConfigError(
            f"draft method {name!r} has settings={kind!r} and architectures={written!r}: expected a subclass of "
            f"specd.config.settings.Config and a tuple of names; see specd.drafts.base.Method"
        )
    return found  # type: ignore[no-any-return]


def settings(name: str, draft: dict[str, Any], where: str) -> Config:
    """A method's settings, from the section `draft` of a run. Raises ConfigError that names `where` and the key."""
    found: Config = convert({"draft": draft}, _section(load(name).settings), where).draft
    return found


def read(path: Path) -> Draft:
    """The draft in a directory, whatever method wrote it.

    Raises ConfigError for one that no method here can run, CheckpointError for a directory that holds no draft.
    """
    config = read_config(path)
    asked = config.get("architectures")
    if isinstance(asked, list) and not _are_names(asked, list):
        raise CheckpointError(f"config.json in {str(path)!r}: architectures is {asked!r}, expected a list of names")
    known: list[str] = []
    broken: list[str] = []
    for name in names():
        try:
            method = load(name)
        except ConfigError as error:  # another one may have written it
            broken.append(f"; {error}")
            continue
        known += method.architectures
        if isinstance(asked, list) and set(asked) & set(method.architectures):
            return method.load(path)
    raise ConfigError(
        f"draft {str(path)!r}: architectures is {asked!r}, expected one of {', '.join(known)}; no method here can run "
        f"this draft{''.join(broken)}"
    )


def _are_names(found: object, kind: type[list[str]] | type[tuple[str, ...]]) -> bool:
    return isinstance(found, kind) and all(isinstance(name, str) for name in found)


@functools.cache
def _section(kind: type[Config]) -> Any:
    """A struct with the one field `draft`, so that errors name the key as it stands in a file."""
    return msgspec.defstruct("Section", [("draft", kind)], kw_only=True)
