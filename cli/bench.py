"""`specd bench`: one question a verb, a table on the terminal or JSON."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

import typer

from specd.errors import ConfigError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

app = typer.Typer(help="Measure what this machine gives, one question a verb.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure what this machine gives, one question a verb."""


@app.command(
    epilog="Examples: `specd bench transport` · `specd bench transport --transports shm --sizes 1M,64M --json`"
)
def transport(
    transports: Annotated[str, typer.Option(help="Which ones, comma-separated; empty for all.")] = "",
    sizes: Annotated[str, typer.Option(help="Bytes of a slot, comma-separated, with K, M or G.")] = "",
    iterations: Annotated[int, typer.Option(min=0, help="Transfers a row; 0 for as many as each size deserves.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How fast does each transport move a slot, next to a raw copy of the same size, and which one would auto take?"""
    from specd.bench.transport import render, run

    result = run(transports=_names(transports), sizes=[_bytes(size) for size in _names(sizes)], iterations=iterations)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        from rich.console import Console

        Console().print(render(result))


@app.command(epilog="Examples: `specd bench daemon` · `specd bench daemon --json`")
def daemon(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """What does a daemon add to a batch, and how well do target and trainer overlap?"""
    from specd.bench.daemon import run

    logging.getLogger("specd").setLevel(logging.WARNING)  # one session after the other is no news here
    result = run()
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        for title, rows in result.items():
            _table(title, rows)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _bytes(text: str) -> int:
    """`64M` as a number of bytes. Raises ConfigError for anything else than digits and one of K, M, G."""
    digits, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    if not digits.isdecimal() or unit not in UNITS or int(digits) == 0:
        raise ConfigError(f"size {text!r}: expected a number of bytes, with K, M or G if wanted, for example 64M")
    return int(digits) * UNITS[unit]


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
