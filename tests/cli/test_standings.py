"""Runs as they stand: followed by their journals, cut back and torn, in 80 columns."""

from __future__ import annotations

from pathlib import Path

import msgspec
from rich.console import Console

from specd.cli.standings import Standing, saved, table
from specd.train.directory import JOURNAL, VALIDATION
from step_records import make_run, measurement, record


def lines(*records: msgspec.Struct) -> bytes:
    return b"".join(msgspec.json.encode(each) + b"\n" for each in records)


def drawn(*standings: Standing) -> list[str]:
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(table(standings))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_a_run_is_followed_and_taken_anew_where_it_was_cut_back(tmp_path: Path) -> None:
    run = Standing("a", "eagle3, cpu", tmp_path)
    assert not run.look()
    journal = tmp_path / JOURNAL
    journal.write_bytes(lines(record(1), record(2, shared=1)) + b'{"step":3')
    (tmp_path / VALIDATION).write_bytes(lines(measurement(2, acceptance_length=1.5)))
    assert run.look()
    assert (run.totals.steps, run.totals.shared, run.held_out) == (2, 1, measurement(2).loss)
    assert not run.look(), "nothing was measured since"
    assert run.acceptance == "1.50"
    with journal.open("ab") as file:
        file.write(lines(record(3))[9:])
    run.look()
    assert run.totals.steps == 3
    journal.write_bytes(lines(record(1, tokens=7)))
    run.look()
    assert (run.totals.steps, run.totals.tokens) == (1, 7)
    journal.write_bytes(lines(record(1, tokens=8), record(2), record(3)))
    run.look()
    assert run.totals.steps == 3
    journal.write_bytes(b"none of it\n")
    run.look()
    assert run.totals.steps == 0


def test_figures_are_whole_in_80_columns(tmp_path: Path) -> None:
    runs = [
        Standing(name, "dflash2, cuda:12", make_run(tmp_path / name, steps=3))
        for name in ("first", "a-name-so-long" * 4)
    ]
    runs.append(Standing("none", "eagle3, cpu", tmp_path / "none"))
    for run in runs:
        run.state = "killed by SIGKILL"
        run.look()
    found = drawn(*runs)
    assert max(map(len, found)) <= 80
    text = "\n".join(found)
    assert "…" not in text
    first = next(line for line in found if line.startswith("first"))
    assert first.split()[1:4] == ["3", "4.8889", "–"]
    assert "250" in first.split()
    assert "acceptance" in found[0]
    assert saved(runs) == "6 batches were trained from 6 forwards of the target: 0 (0%) were shared"
    assert saved(runs[2:]) == "no batch was trained"
    assert "acceptance" not in drawn(runs[2])[0]
