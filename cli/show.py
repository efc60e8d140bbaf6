"""`specd data show`: rows as the target reads them, and which of their tokens are labels."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from specd.cli.settings import (
    Data,
    DataSettings,
    Files,
    Method,
    Model,
    Preset,
    data_config,
    named,
    needed,
    tokenizer_dir,
)
from specd.drafts import registry
from specd.errors import ConfigError

EXAMPLES = (
    "Examples: `specd data show chats.jsonl --row 3 --model Qwen3-8B` · "
    "`specd data show chats.jsonl --row 1-5,9 --ids --model Qwen3-8B --set data.last_turn_only=true`"
)


def show(
    files: Files = None,
    data: Data = None,
    model: Model = "",
    row: Annotated[str, typer.Option("--row", "-n", help="Which rows, from 1: 3, 1-5 or 1,4,7-9.")] = "1",
    ids: Annotated[bool, typer.Option("--ids", help="A line for each token: its id, its text, if a label.")] = False,
    method: Method = registry.DEFAULT,
    preset: Preset = "",
    settings: DataSettings = None,
) -> None:
    """Show rows as the target reads them, with the tokens that are labels in colour, or in brackets without colour.

    A row that cannot be used is shown as what is wrong with it. Exits with 1 then, unless data.bad_rows is skip.
    """
    from specd.cli.page import Page
    from specd.data.dataset import dated
    from specd.data.faults import RowError
    from specd.data.inspection import look
    from specd.data.samples import Job, Maker

    wanted = numbers(row)
    config = data_config(named(files, data), needed(model), settings, method=method, preset=preset)
    directory = tokenizer_dir(model)
    labels = registry.load(method).consecutive_labels
    maker = Maker(Job(dated(config, directory), directory, labels))
    page = Page(maker.encoder.tokenizer, config, method, labels, ids=ids)
    bad = 0
    try:
        for number, where, coded in look(maker, wanted):
            if isinstance(coded, RowError):
                bad += 1
                page.fault(number, coded)
            else:
                page.row(number, where, coded)
    finally:
        page.legend()
    if bad and config.bad_rows == "stop":
        raise typer.Exit(1)


def numbers(text: str) -> tuple[range, ...]:
    """The row numbers that "3", "1-5" or "1,4,7-9" stands for. Raises ConfigError for anything else."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ConfigError(f"--row {text!r}: expected rows from 1, as 3, 1-5 or 1,4,7-9")
        found.append(range(first, last + 1))
    return tuple(found)
