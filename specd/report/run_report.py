"""The report of a run: one HTML file without outside assets, for screen, phone and paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from specd import units
from specd.config.settings import RunConfig
from specd.errors import CheckpointError
from specd.evaluate import intervals
from specd.evaluate.results import DEFINITION, EVALS, ROUNDINGS, EvalFacts, load_facts
from specd.report import figures, page
from specd.report.chart import Chart
from specd.report.page import text
from specd.train.directory import JOURNAL, VALIDATION, RunFacts, read_facts
from specd.train.journal import StepRecord, bound, read
from specd.train.measurement import Measurement
from specd.train.measurement import read as measurements
from specd.train.trackers import flat

ACCEPTANCE = DEFINITION.partition(" = ")[2]
DEFINITIONS = {
    "acceptance length": ACCEPTANCE,
    "95 % interval": (
        f"of the acceptance over prompts like these: {intervals.RESAMPLES:,} times as many prompts were drawn from "
        "those decoded, with replacement, and 95 % of the results lie in it; with fewer than "
        f"{intervals.FEW} prompts it is too narrow"
    ),
    "identical outputs": (
        "prompts whose speculative output equals the target's own greedy output, token for token; an output that parts "
        "from it at a tie does so where two logits lie within the rounding of the target's dtype: "
        f"{ROUNDINGS} · epsilon · the largest logit"
    ),
    "teacher-forced accuracy": (
        "share of predictions that are right when the draft is given true tokens: those of the data for block drafts, "
        "the target's most likely ones for EAGLE-3; it is a training signal, not the acceptance length"
    ),
    "loss": (
        "cross-entropy, later offsets weighted less, averaged over an optimizer step: for DFlash and DFlash2 on the "
        "tokens of the data, over the weights of all predictions, or, where draft.loss is dpace, whose weights grow as "
        "the draft learns, over the blocks; for DSpark a tenth of that, with the distance from the target's "
        "distribution and the error of its confidence; for EAGLE-3 on the target's distribution, the sum of its steps "
        "over the number of first guesses"
    ),
    "time split": (
        "target: the trainer waited while its next batch was being computed; wire: it waited while the batch was ready "
        "but not fetched; trainer: everything else of the step"
    ),
    "step over bound": (
        "measured step time over the larger of target time per daemon and the steps' own time on the trainer's "
        "device: 1.0 is a perfect overlap"
    ),
}


ALWAYS = ("data.path", "data.max_length", "data.batch_tokens", "train.lr", "train.epochs", "train.seed")
"""Settings that a report shows above its charts whether they were changed or not."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What a run left behind. evals: by the names of EVALS. held_out: what was measured on rows not trained on."""

    facts: RunFacts
    records: list[StepRecord]
    evals: dict[str, EvalFacts]
    held_out: list[Measurement] = []


def load(run: Path) -> Run:
    """Read a run's directory. Raises CheckpointError for one that holds no finished step."""
    facts, records = read_facts(run), read(run / JOURNAL)
    if not records:
        raise CheckpointError(f"{run / JOURNAL} has no finished step: let the run get further, then report again")
    evals = {name: load_facts(run / file, EvalFacts) for name, file in EVALS.items() if (run / file).exists()}
    return Run(facts=facts, records=records, evals=evals, held_out=measurements(run / VALIDATION))


def write_report(run: Path, to: Path | None = None) -> Path:
    """Write `report.html` into a run directory, or the file `to`, and return its path. Raises as `load`."""
    found = load(run)
    path = to or run / "report.html"
    page.save(path, render(found.facts, found.records, found.evals, found.held_out))
    return path


def render(
    facts: RunFacts,
    records: Sequence[StepRecord],
    evals: Mapping[str, EvalFacts],
    held_out: Sequence[Measurement] = (),
) -> str:
    """The page, from what a run left behind."""
    alike = comparable(evals)
    pictures = [
        (
            "Loss",
            figures.loss(records, held_out),
            "Every optimizer step (pale) and the running mean over 5 % of the run."
            + " Points: rows that are held out of training." * bool(held_out),
        ),
        ("Teacher-forced accuracy", figures.accuracy(records), "Running means. Not the acceptance length."),
        ("Time of a step", figures.time_split(records), _time_caption(records)),
    ]
    if alike:
        pictures.insert(1, ("Acceptance by offset", *acceptance(alike)))
    name = title(facts)
    body = [
        f"<header><h1>{text(name)}</h1><p>{text(_subtitle(facts, records))}</p></header>",
        f'<section class="tiles">{"".join(page.tile(*one) for one in key_figures(records, alike, held_out))}</section>',
        page.settings(key_settings(facts)),
        f'<section class="pictures">{"".join(page.picture(*one) for one in pictures)}</section>',
        f"<section><h2>What the figures mean</h2>{page.definitions(DEFINITIONS)}</section>",
        '<section class="tables">',
        page.table("Target", facts.target),
        page.table("Draft", facts.draft),
        page.table("Data", facts.data),
        page.table("Evaluation", _evaluation(evals)),
        *([page.table("Held-out rows", _held_out(held_out))] if held_out else []),
        page.table("Transports", facts.transports),
        page.table("Machine", facts.machine),
        "</section>",
        f"<section><h2>Configuration</h2><pre>{text(_yaml(facts.config))}</pre></section>",
    ]
    return page.document(f"specd report: {facts.target.get('model', '')}", "\n".join(body))


def title(facts: RunFacts) -> str:
    """What was trained, and for which target."""
    method = str(facts.draft.get("method", "")).partition(" (")[0]
    target = str(facts.target.get("model", ""))
    return f"{method} draft for {target}" if method else f"Draft for {target}"


def key_settings(facts: RunFacts) -> dict[str, Any]:
    """What the draft is, and the settings that matter: those of ALWAYS, and all others that are not the defaults."""
    shown = {f"draft: {name}": value for name, value in facts.draft.items() if name != "method"}
    given = flat(facts.config)
    usual = flat(msgspec.json.decode(msgspec.json.encode(RunConfig(method=""))))
    for name, value in given.items():
        section = name.partition(".")[0]
        if section not in ("target", "data", "train", "subscriber") or name == "target.model":
            continue
        if name in ALWAYS or value != usual.get(name):
            shown[name] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return shown


def acceptance(evals: Mapping[str, EvalFacts]) -> tuple[Chart, str]:
    """The chart of the shares accepted at each offset, a line for each evaluation, and its caption."""
    shares = {name: one.result.acceptance_by_offset for name, one in evals.items()}
    bands = {name: intervals.acceptance_by_offset(one.result.prompts) for name, one in evals.items()}
    caption = (
        "Share of the target's forwards with a guess k in which it accepted the first k guesses, in real decoding."
    )
    if any(bands.values()):
        caption += " Bands: 95 % intervals."
    return figures.acceptance(shares, bands), caption


def comparable(evals: Mapping[str, EvalFacts]) -> dict[str, EvalFacts]:
    """Those that decoded the same texts as the trained draft's."""
    return {name: facts for name, facts in evals.items() if facts.texts == evals.get("trained", facts).texts}


def key_figures(
    records: Sequence[StepRecord], evals: Mapping[str, EvalFacts], held_out: Sequence[Measurement] = ()
) -> list[tuple[str, str, str]]:
    """The figures that matter most: value, name, remark. evals: of the same texts."""
    wall, tokens = sum(record.step_s for record in records), sum(record.tokens for record in records)
    tiles: list[tuple[str, str, str]] = []
    if (after := evals.get("trained")) is not None:
        before = evals.get("untrained")
        remark = f"{before.acceptance_length:.2f} untrained" if before else "1.0 is plain decoding"
        remark = "; ".join(part for part in (intervals.said(after.result.prompts), remark) if part)
        tiles.append((f"{after.acceptance_length:.2f}", "acceptance length", remark))
        tiles.append(
            (
                f"{after.identical} of {after.prompts}",
                "identical outputs",
                f"{after.result.new_tokens:,} tokens compared" + _ties(after),
            )
        )
    first, last = _ends([record.loss for record in records])
    tiles.append((f"{last:.2f}", "loss", f"{first:.2f} at the start"))
    if held_out and held_out[-1].best_loss is not None:
        end = held_out[-1]
        remark = f"the lowest, at step {end.best_step:,}; step {end.step:,} has {_two(end.loss)}"
        tiles.append((_two(end.best_loss), "held-out loss", remark))
    first, last = _ends([record.teacher_forced_accuracy for record in records])
    tiles.append((f"{last:.0%}", "teacher-forced accuracy", f"{first:.0%} at the start"))
    tiles.append((f"{tokens / wall:,.0f}", "tokens per second", f"{tokens:,} tokens in {units.duration(wall)}"))
    samples = sum(len(batch.samples) for record in records for batch in record.batches)
    each = units.duration(wall / samples)
    tiles.append((each, "time per sample", f"{samples:,} samples in {len(records):,} steps"))
    return tiles


def _two(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def step_over_bound(records: Sequence[StepRecord], daemons: int) -> float | None:
    """Measured time over max(target time / daemons, the steps' own time); None when no time was measured."""
    limit = max(sum(r.forward_s for r in records) / max(1, daemons), sum(r.draft_s or r.train_s for r in records))
    return sum(record.step_s for record in records) / limit if limit else None


def _ends(values: Sequence[float | None]) -> tuple[float, float]:
    """Means of the first and the last twentieth of what is known."""
    known = [value for value in values if value is not None] or [0.0]
    count = max(1, len(known) // 20)
    return sum(known[:count]) / count, sum(known[-count:]) / count


def shares(records: Sequence[StepRecord]) -> tuple[float, float, float]:
    """Of the steps' time: waiting for the target, for the wire, and the rest."""
    total = sum(record.step_s for record in records) or 1.0
    return (
        sum(record.target_wait_s for record in records) / total,
        sum(record.wire_wait_s for record in records) / total,
        sum(record.train_s for record in records) / total,
    )


def _time_caption(records: Sequence[StepRecord]) -> str:
    target, wire, train = shares(records)
    return f"{bound(target, wire, train)}-bound: target {target:.0%}, wire {wire:.1%}, trainer {train:.0%} of the time."


def _subtitle(facts: RunFacts, records: Sequence[StepRecord]) -> str:
    wall = sum(record.step_s for record in records)
    again = sum(record.resubmitted for record in records)
    parts = [f"{len(records):,} optimizer steps in {units.duration(wall)}", f"started {facts.started}"]
    parts.append(_time_caption(records).split(":")[0])
    if (ratio := step_over_bound(records, len(facts.transports))) is not None:
        parts.append(f"step over bound {ratio:.2f}")
    batches = sum(len(record.batches) for record in records)
    if shared := sum(record.shared for record in records):
        parts.append(f"{shared:,} of {batches:,} batches from others' forwards")
    if replayed := sum(record.replayed for record in records):
        parts.append(f"{replayed:,} of {batches:,} batches replayed")
    if again:
        parts.append(f"{again} batches resubmitted")
    return " · ".join(parts)


def _evaluation(evals: Mapping[str, EvalFacts]) -> dict[str, Any]:
    if not evals:
        return {"none": "run specd eval, then specd report again"}
    rows: dict[str, Any] = {}
    for name, facts in evals.items():
        result = facts.result
        sure = intervals.said(result.prompts)
        rows[f"{name}: acceptance length"] = f"{result.acceptance_length:.3f}" + f" ({sure})" * bool(sure)
        source = f" of {facts.source}" if facts.source else ""
        rows[f"{name}: prompts"] = f"{facts.prompts}{source}, at most {facts.max_new_tokens} tokens each"
        for fault in facts.bad:
            rows[f"{name}: cannot be used, {fault.kind}"] = f"{fault.rows:,}, the first: {fault.first}"
        rows[f"{name}: identical outputs"] = f"{facts.identical} of {facts.prompts}{_ties(facts)}"
        rows[f"{name}: forwards"] = f"{result.forwards:,} for {result.new_tokens:,} tokens"
        rows[f"{name}: speed"] = f"{result.tokens_per_s:.1f} tokens/s, {result.greedy_tokens_per_s:.1f} without a draft"
        rows[f"{name}: guesses in a row"] = facts.block_size - 1
        if facts.dtype:
            rows[f"{name}: target computes in"] = facts.dtype
    return rows


def _held_out(found: Sequence[Measurement]) -> dict[str, Any]:
    last = found[-1]
    rows: dict[str, Any] = {
        "measured": f"{len(found):,} times, {last.tokens:,} tokens each, the last time at step {last.step:,}",
        "loss": _two(last.loss),
        "lowest loss": f"{_two(last.best_loss)} at step {last.best_step:,}",
    }
    for one in [one for one in found if one.acceptance_length is not None][-1:]:
        rows["acceptance length"] = f"{one.acceptance_length:.3f} at step {one.step:,}, decoded at the daemon"
    if last.teacher_forced_accuracy is not None:
        rows["teacher-forced accuracy"] = f"{last.teacher_forced_accuracy:.1%}"
    for offset, share in enumerate(last.teacher_forced_by_offset, start=1):
        rows[f"at offset {offset}"] = "nothing counted" if share is None else f"{share:.1%}"
    return rows


def _ties(facts: EvalFacts) -> str:
    return f", {facts.ties} part at a tie" if facts.ties else ""


def _yaml(config: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
