"""What every verb has without saying so: its examples a line each, the defaults of its settings, how it logs."""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, TextIO

import msgspec
import typer
from typer.core import TyperCommand

from specd import log
from specd.config.describe import settings
from specd.config.settings import DaemonConfig, RunConfig
from specd.errors import ConfigError

WIDTH = 78
DEFAULTS: dict[str, tuple[type[msgspec.Struct], dict[str, str]]] = {
    "train": (
        RunConfig,
        {
            "endpoint": "subscriber.endpoints", "transport": "subscriber.transport", "depth": "subscriber.depth",
            "max_steps": "train.max_steps", "max_minutes": "train.max_minutes", "device": "train.device",
        },
    ),
    "start": (
        DaemonConfig,
        {
            **{name: f"target.{name}" for name in (
                "backend", "load_format", "num_layers", "device", "dtype", "tp", "memory_fraction", "attention_backend"
            )},
            "slots": "ring.slots", "slot_tokens": "ring.slot_tokens", "endpoint": "endpoint",
            "transports": "transports",
        },
    ),
}  # fmt: skip
"""Verb -> its settings, and which of them an option stands for."""


class Verb(TyperCommand):
    """A command whose help ends with its examples, each to be copied as it stands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        epilog, self.epilog = self.epilog, None
        try:
            super().format_help(ctx, formatter)
        finally:
            self.epilog = epilog
        if epilog:
            typer.echo("\n".join([" Examples:", "", *examples(epilog), ""]))


def furnish(command: Any, name: str = "") -> None:
    """Complete a verb, or all verbs of a group."""
    if inner := getattr(command, "commands", None):
        for verb, each in inner.items():
            furnish(each, verb)
        return
    command.__class__ = Verb
    command.params += [*_logging().params]
    kind, options = DEFAULTS.get(name, (RunConfig, {}))
    known = {path: field for path, field, _ in settings(kind)}
    for param in command.params:
        if param.name in options:
            value = known[options[param.name]].default
            shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            param.show_default = shown


def examples(epilog: str) -> Iterator[str]:
    """The commands between backticks in `epilog`, a line each; what is longer than a terminal goes on behind a `\\`."""
    for command in re.findall(r"`([^`]+)`", epilog):
        lines = _folded(command)
        yield from (f"  {line}" for line in lines)


def _folded(command: str) -> list[str]:
    if len(command) <= WIDTH - 2:
        return [command]
    words = re.findall(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""", command)
    # Blanks in quotes, and those between an option and its value, are no place to fold.
    joined = re.sub(r"(^| )(-\S+) (?!-)", "\\1\\2\0", " ".join(word.replace(" ", "\0") for word in words))
    lines = textwrap.wrap(joined, WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return " \\\n    ".join(line.replace("\0", " ") for line in lines).split("\n")


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever the standard error is by then: a bar that is shown there takes lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def log_to_stderr(level: int) -> None:
    """Give the `specd` logger its one handler, and the level, which the processes of a command read from SPECD_LOG."""
    logger = logging.getLogger("specd")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
    handler = StderrHandler()
    handler.setFormatter(log.formatter())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    os.environ[log.LEVEL] = logging.getLevelName(level)


def log_in(form: str) -> None:
    """Choose the form of log lines, for the processes of a command, too. Raises ConfigError for one that is none."""
    if form not in log.FORMS:
        raise ConfigError(f"--log-format {form!r}: expected one of {', '.join(log.FORMS)}")
    os.environ[log.FORM] = form


def _logging() -> Any:
    """A command with the options of every verb; they do what they say where they stand."""

    def options(
        verbose: Annotated[
            bool,
            typer.Option("--verbose", "-v", help="Log every step.", rich_help_panel="Log", callback=_verbose),
        ] = False,
        quiet: Annotated[
            bool,
            typer.Option("--quiet", "-q", help="Log warnings and errors only.", rich_help_panel="Log", callback=_quiet),
        ] = False,
        log_format: Annotated[
            str,
            typer.Option(
                "--log-format", help="text, or json: an object a line.", rich_help_panel="Log", callback=_form
            ),
        ] = "",
    ) -> None: ...

    app = typer.Typer(add_completion=False)
    app.command()(options)
    command: Any = typer.main.get_command(app)
    command.params = [param for param in command.params if param.name in ("verbose", "quiet", "log_format")]
    for param in command.params:
        param.expose_value = False
    return command


def _verbose(given: bool) -> None:
    if given:
        log_to_stderr(logging.DEBUG)


def _quiet(given: bool) -> None:
    if given:
        log_to_stderr(logging.WARNING)


def _form(given: str) -> None:
    if given:
        log_in(given)
        log_to_stderr(logging.getLogger("specd").level)
