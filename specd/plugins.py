"""Families of plug-ins: what comes with specd by name, and what other packages add under an entry-point group."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from specd.errors import SpecdError


class Family(NamedTuple):
    """One family. what: its members are called, in messages. builtin: name → "module:attribute", imported when used.

    group: of entry points. error: raised for a name that is not known or cannot be imported.
    """

    what: str
    builtin: dict[str, str]
    group: str
    error: type[SpecdError]

    def names(self) -> list[str]:
        """All names: built-in ones first, then plug-ins. Nothing is imported."""
        plugins = {entry.name for entry in entry_points(group=self.group)}
        return [*self.builtin, *sorted(plugins - self.builtin.keys())]

    def load(self, name: str) -> Any:
        """Import what is called `name`. Raises `error` that lists the known names, or says what failed."""
        try:
            if name in self.builtin:
                module, _, attribute = self.builtin[name].partition(":")
                return getattr(importlib.import_module(module), attribute)
            plugins = {entry.name: entry for entry in entry_points(group=self.group)}
            if name in plugins:
                return plugins[name].load()
        except SpecdError:
            raise
        except Exception as error:  # a plug-in's import may raise anything
            failed = f"{self.what} {name!r} cannot be imported: {type(error).__name__}: {error}"
            raise self.error(failed) from error
        raise self.error(f"unknown {self.what} {name!r}; known here: {', '.join(self.names())}")
