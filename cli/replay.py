"""`specd replay`: what a store of kept states holds, and whether all of it is whole."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from specd import units
from specd.errors import DaemonError

if TYPE_CHECKING:
    from specd.protocol.contract import ReplayInfo
    from specd.replay.files import Files, Found

EXAMPLES = "Examples: `specd replay /nvme/states` · `specd replay /nvme/states --check`"
SHOWN = 10


def replay(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The DIR of specd start --replay DIR.")],
    check: Annotated[bool, typer.Option("--check", help="Read every batch, while no daemon uses it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a store of kept states: whose they are, how much it holds, what is damaged. Changes nothing.

    Exit code 1 if anything is damaged; a daemon computes that again.
    """
    from specd.replay.files import Files

    store, page = Files.view(directory)
    try:
        data = {
            "directory": str(directory),
            "identity": msgspec.to_builtins(page.identity),
            "cells": page.cells,
            "cell_bytes": page.cell_bytes,
            "direct": store.direct,
            **_look(store, directory, check),
        }
    except OSError as error:
        raise DaemonError(f"{directory} cannot be read: {error.strerror or error}; look at that disk") from None
    finally:
        store.close()
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        _show(data, str(page.identity))
    raise typer.Exit(1 if data["damaged"] else 0)


def kept(info: ReplayInfo) -> str:
    """How many of a daemon's cells hold a batch."""
    failed = f"its disk is switched off ({info.failed}); " if info.failed else ""
    encoded = f" as {info.encoding}" if info.encoding != "raw" else ""
    return f"{failed}{info.used:,} of {info.cells:,} cells hold a batch{encoded}, {units.size(info.cell_bytes)} each"


def replayed(counts: Mapping[str, int]) -> str:
    """What became of the batches that were asked for, by counters of a daemon."""
    hit, miss = counts.get("replay_hit", 0), counts.get("replay_miss", 0)
    faults = ((word, counts.get(f"replay_{word}", 0)) for word in ("skipped", "damaged"))
    bad = "".join(f", {count:,} {word}" for word, count in faults if count)
    share = f" ({hit / (hit + miss):.0%})" if hit + miss else ""
    return f"{hit:,} of {hit + miss:,} batches replayed{share}, {counts.get('replay_wrote', 0):,} written{bad}"


def _look(store: Files, directory: Path, check: bool) -> dict[str, Any]:
    """How much a store holds; with `check`, by every byte of it."""
    from specd.replay.files import unused

    if not check:
        return _sum(list(store.scan()), [])
    with unused(directory):
        found = list(store.scan())
        begin = time.perf_counter()
        damaged = [each.cell for each in found if each.header is not None and not _whole(store, each)]
        return _sum(found, damaged) | {"checked_s": time.perf_counter() - begin}


def _whole(store: Files, found: Found) -> bool:
    from specd.replay.form import DamageError, whole_pages

    assert found.header is not None
    size = whole_pages(found.header.nbytes)
    if not 0 < size <= store.cell_bytes:
        return False
    try:
        store.read(found.cell, found.header.key, memoryview(mmap.mmap(-1, size)))
    except DamageError:
        return False
    return True


def _sum(found: list[Found], damaged: list[int]) -> dict[str, Any]:
    headers = [each.header for each in found if each.header is not None and each.cell not in damaged]
    return {
        "batches": len(headers),
        "tokens": sum(header.tokens for header in headers),
        "nbytes": sum(header.nbytes for header in headers),
        "damaged": sorted([*damaged, *(each.cell for each in found if each.damaged)]),
    }


def _show(data: dict[str, Any], identity: str) -> None:
    nbytes, damaged = data["nbytes"], data["damaged"]
    cells = f"{data['cells']:,} cells, {units.size(data['cell_bytes'])} each"
    lines = [
        ("store", f"{data['directory']}: {cells}{', O_DIRECT' if data['direct'] else ', through the page cache'}"),
        ("states", identity),
        ("", f"fingerprint {data['identity']['fingerprint']}"),
        ("holds", f"{data['batches']:,} batches, {data['tokens']:,} tokens, {nbytes:,} bytes ({units.size(nbytes)})"),
    ]
    if (took := data.get("checked_s")) is not None:
        speed = f" at {nbytes / took / 1e9:.2f} GB/s" if nbytes else ""
        lines.append(("checked", f"every batch{speed}"))
    if damaged:
        shown = ", ".join(map(str, damaged[:SHOWN])) + (", …" if len(damaged) > SHOWN else "")
        lines.append(("damaged", f"{len(damaged)} cells ({shown}): a daemon computes them again"))
    elif took is not None:
        lines.append(("damaged", "none"))
    for name, value in lines:
        typer.echo(f"{name:8} {units.printable(value)}")
