"""Several runs side by side: their figures, their curves, and the settings in which they differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specd import units
from specd.errors import ConfigError
from specd.evaluate import intervals
from specd.evaluate.results import EvalFacts
from specd.report import figures, page, run_report
from specd.report.page import text
from specd.report.run_report import Run
from specd.train.journal import StepRecord
from specd.train.trackers import flat

NAME = "comparison.html"
NONE = "–"


def write_comparison(runs: Sequence[Path], to: Path | None = None) -> Path:
    """Write one page about several runs, into the first one's directory unless `to` names a file; returns its path.

    Raises ConfigError for a run that is there twice, CheckpointError for one without a finished step.
    """
    found: dict[str, Run] = {}
    for name, run in zip(names(runs), runs, strict=True):
        found[name] = run_report.load(run)
    path = to or runs[0] / NAME
    page.save(path, render(found))
    return path


def names(runs: Sequence[Path]) -> list[str]:
    """What each run is called: its path below the directory that all share.

    Raises ConfigError for the same one twice.
    """
    paths = [run.resolve() for run in runs]
    for run, path in zip(runs, paths, strict=True):
        if paths.count(path) > 1:
            raise ConfigError(f"run {str(run)!r} is there twice: name each run once")
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(shared)) for path in paths]


def render(runs: Mapping[str, Run]) -> str:
    """The page. runs: by name, at least two; gains are over the first."""
    steps = {name: run.records for name, run in runs.items()}
    pictures = [
        ("Loss", figures.compared(steps, lambda r: r.loss, "loss (nats)", "{:.4f}"), _loss_caption(runs)),
        ("Teacher-forced accuracy",
         figures.compared(steps, _accuracy, "teacher-forced accuracy (%)", "{:.1f} %"),
         "Running means, all offsets. Not the acceptance length."),
        ("Speed", figures.compared(steps, _speed, "tokens per second", "{:,.0f} tokens/s"),
         "Running means of the target's tokens a second."),
    ]  # fmt: skip
    decoded = _decoded(runs)
    if decoded:
        pictures.insert(1, ("Acceptance by offset", *run_report.acceptance(decoded)))
    first = next(iter(runs))
    body = [
        f"<header><h1>{text(f'{len(runs)} runs')}</h1><p>{text(', '.join(runs))}</p></header>",
        f"<section>{page.columns(list(runs), key_rows(runs))}</section>",
        f"<section><h2>What they differ in</h2>{_differences(runs)}</section>",
        f'<section class="pictures">{"".join(page.picture(*one) for one in pictures)}</section>',
        f"<section><h2>What the figures mean</h2>{page.definitions(_definitions(first))}</section>",
    ]
    return page.document(f"specd report: {', '.join(runs)}", "\n".join(body))


def key_rows(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """The figures that matter most: names, and a value for each run."""
    base = next(iter(runs.values())).evals.get("trained")
    rows: dict[str, list[str]] = {
        "trained": [run_report.title(run.facts) for run in runs.values()],
        "acceptance length": [],
        "gain over the first run": [],
        "identical outputs": [],
    }
    for index, run in enumerate(runs.values()):
        facts = run.evals.get("trained")
        rows["acceptance length"].append(_length(facts))
        rows["gain over the first run"].append(NONE if index == 0 else gain(base, facts))
        rows["identical outputs"].append(f"{facts.identical} of {facts.prompts}" if facts else NONE)
        for name, value in _trained(run.records).items():
            rows.setdefault(name, []).append(value)
    return rows


def gain(before: EvalFacts | None, after: EvalFacts | None) -> str:
    """By how much an acceptance length grew on the same prompts, with its interval, in words."""
    if before is None or after is None:
        return NONE
    if _prompts(before) != _prompts(after):
        return "not comparable: other prompts or limits"
    grown = f"{after.acceptance_length - before.acceptance_length:+.2f}"
    found = intervals.acceptance_gain(before.result.prompts, after.result.prompts)
    return grown if found is None else f"{grown} (95 %: {found[0]:+.2f} to {found[1]:+.2f})"


def differing(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys whose values are not the same in all; rows: by run."""
    keys = dict.fromkeys(key for row in rows.values() for key in row)
    cells = {key: [_said(row.get(key)) for row in rows.values()] for key in keys}
    return {key: values for key, values in cells.items() if len(set(values)) > 1}


def _differences(runs: Mapping[str, Run]) -> str:
    """A table of the settings and facts in which the runs differ."""
    rows = {}
    for name, run in runs.items():
        parts = {"target": run.facts.target, "data": run.facts.data, "machine": run.facts.machine}
        facts = {f"{part}: {key}": value for part, known in parts.items() for key, value in known.items()}
        rows[name] = {key: value for key, value in flat(run.facts.config).items() if key != "output"} | facts
    found = differing(rows)
    return page.columns(list(runs), found) if found else "<p>Nothing: settings, target, data and machine are alike.</p>"


def _trained(records: Sequence[StepRecord]) -> dict[str, str]:
    tiles = {name: f"{value} ({remark})" for value, name, remark in run_report.key_figures(records, {})}
    wall = sum(record.step_s for record in records)
    shares = run_report.shares(records)
    split = ", ".join(f"{who} {part:.0%}" for who, part in zip(("target", "wire", "trainer"), shares, strict=True))
    return {"optimizer steps": f"{len(records):,} in {units.duration(wall)}"} | tiles | {"time split": split}


def _decoded(runs: Mapping[str, Run]) -> dict[str, EvalFacts]:
    """The evaluations of trained drafts on the same prompts as the first that has one."""
    evals = {name: run.evals["trained"] for name, run in runs.items() if "trained" in run.evals}
    base = next(iter(evals.values()), None)
    return {name: facts for name, facts in evals.items() if base and _prompts(facts) == _prompts(base)}


def _prompts(facts: EvalFacts) -> tuple[object, ...]:
    """What was decoded under which limits. How far a draft guesses is its own affair."""
    lengths = tuple(row.prompt_tokens for row in facts.result.prompts)
    return facts.model, facts.source, facts.dtype, facts.max_new_tokens, lengths


def _length(facts: EvalFacts | None) -> str:
    if facts is None:
        return "none: run specd eval, then specd report again"
    sure = intervals.said(facts.result.prompts)
    return f"{facts.acceptance_length:.2f}" + f" ({sure})" * bool(sure)


def _accuracy(record: StepRecord) -> float | None:
    share = record.teacher_forced_accuracy
    return None if share is None else 100 * share


def _speed(record: StepRecord) -> float:
    return record.tokens / (record.step_s or 1.0)


def _loss_caption(runs: Mapping[str, Run]) -> str:
    drafts = [(run.facts.draft, run.facts.config.get("draft", {})) for run in runs.values()]
    kinds = {(str(draft.get("method")), str(settings.get("loss"))) for draft, settings in drafts}
    alike = "" if len(kinds) == 1 else " These methods have different losses, whose heights do not compare."
    return f"Running means over 5 % of each run.{alike}"


def _definitions(first: str) -> dict[str, str]:
    said = (
        f"acceptance length minus that of {first}, where both decoded the same prompts; its interval draws the "
        "prompts of both together, and an interval without 0 is a difference that these prompts show"
    )
    return {"gain over the first run": said} | run_report.DEFINITIONS


def _said(value: Any) -> str:
    return NONE if value in ("", None) else str(value)
