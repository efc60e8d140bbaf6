"""Drafts that a run leaves: where they are, what they say of their making, and how one is taken away.

Every checkpoint holds the draft of its step in `draft/`, and a run that came to its end holds the last one. Beside the
weights stands `specd.json`, which names target, data and settings, so that a draft is known wherever it is taken.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from specd.drafts.card import with_section
from specd.drafts.directory import read_config
from specd.drafts.files import sync
from specd.errors import CheckpointError, ConfigError, writing
from specd.evaluate.results import EVALS, EvalFacts, load_facts
from specd.paths import replacing
from specd.train.checkpoint import STATE, finished_checkpoints
from specd.train.directory import FACTS, RunFacts, read_facts, utc

PROVENANCE = "specd.json"
"""What a draft says of its making."""
README = "README.md"
AGAIN = "give the same command again"


class DraftFacts(RunFacts, frozen=True, kw_only=True):
    """The facts of a run as its draft carries them: without machine, paths of data and outputs.

    step: optimizer steps that it was trained. steps: of the whole run, as it was planned then.
    """

    step: int
    steps: int


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A draft. directory: of the draft itself. run: the run that it is in, checkpoint: the checkpoint, if any.

    facts: None for a draft that says nothing of its making, as those of others.
    """

    directory: Path
    facts: DraftFacts | None = None
    run: Path | None = None
    checkpoint: Path | None = None

    @property
    def home(self) -> Path:
        """Where its evaluations are kept: with the run if it is its last draft, with the checkpoint, or with itself."""
        return self.checkpoint or self.run or self.directory


def find(path: Path) -> Found:
    """The draft that `path` means: a draft's directory, a checkpoint, or a run, of which the newest draft is taken.

    Raises CheckpointError where none is, and says what to do.
    """
    place = path if path.name else path.absolute()
    if (place / FACTS).is_file():
        return _of_run(place)
    if (place / STATE).is_file():
        return _of_checkpoint(place)
    if (place / "draft" / "config.json").is_file():
        return Found(directory=place / "draft", facts=_facts(place / "draft"))
    read_config(place)
    if place.name == "draft" and (place.parent / STATE).is_file():
        return _of_checkpoint(place.parent)
    run = place.parent if place.name == "draft" and (place.parent / FACTS).is_file() else None
    return Found(directory=place, facts=_facts(place), run=run)


def _of_run(run: Path) -> Found:
    last = run / "draft"
    kept = finished_checkpoints(run / "checkpoints")
    step, newest = kept[-1] if kept else (0, None)
    if (last / "config.json").is_file():
        facts = _facts(last)
        if newest is None or facts is None or facts.step >= step:
            return Found(directory=last, facts=facts, run=run)
    if newest is None:
        raise CheckpointError(
            f"{str(run)!r} has no draft yet, as it ended before its first checkpoint: go on with `specd resume "
            f"{shlex.quote(str(run))}`"
        )
    return _of_checkpoint(newest)


def _of_checkpoint(path: Path) -> Found:
    if not (path / "draft" / "config.json").is_file():
        raise CheckpointError(
            f"checkpoint {str(path)!r} holds no draft, as those of specd 0.1.0: go on with `specd resume "
            f"{shlex.quote(str(path.parent.parent))}`, whose next one does"
        )
    run = (path if len(path.parts) > 2 else path.absolute()).parent.parent
    return Found(
        directory=path / "draft",
        facts=_facts(path / "draft"),
        run=run if (run / FACTS).is_file() else None,
        checkpoint=path,
    )


def _facts(draft: Path) -> DraftFacts | None:
    if not (draft / PROVENANCE).is_file():
        return None
    try:
        return load_facts(draft / PROVENANCE, DraftFacts)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; or remove it, and the draft says nothing of its making") from None


def run_facts(found: Found) -> RunFacts | None:
    """What is known of the run that made a draft; None for a draft of others."""
    if found.facts is not None:
        return found.facts
    return read_facts(found.run) if found.run is not None else None


def sign(draft: Path, facts: RunFacts, step: int, steps: int) -> None:
    """Write into a draft's directory what it says of its making."""
    said = DraftFacts(
        started=facts.started,
        finished=utc(),
        target=facts.target,
        draft=facts.draft,
        data={name: value for name, value in facts.data.items() if not name.startswith(("path", "cannot be used:"))},
        transports={},
        machine={name: value for name, value in facts.machine.items() if name in ("GPU", "specd", "torch")},
        config=_portable(facts.config),
        changes=facts.changes,
        step=step,
        steps=steps,
    )
    _write(draft / PROVENANCE, msgspec.json.format(msgspec.json.encode(said), indent=1) + b"\n")
    describe(draft, said, None)


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that say something of a draft elsewhere: no paths of its run, no daemons and keys."""
    data = {name: value for name, value in config.get("data", {}).items() if name not in ("path", "cache_dir")}
    kept = {name: config[name] for name in ("method", "draft", "capture", "train", "target") if name in config}
    return kept | {"data": data}


def describe(draft: Path, facts: DraftFacts, evaluated: EvalFacts | None) -> None:
    """Bring the README of a draft up to date: how it was trained, and what was measured of it."""
    whole = "" if facts.step >= facts.steps else f" of {facts.steps:,} planned: the run was not finished"
    states = facts.config.get("capture", {}).get("dtype", "auto")
    rows: dict[str, str] = {
        "steps": f"{facts.step:,}{whole}",
        "target": f"{facts.target.get('model', '')} ({facts.target.get('fingerprint', '')})",
        "revision of the target": str(facts.target.get("revision", "")),
        **{name: facts.data[name] for name in ("samples", "tokens", "trainable tokens") if name in facts.data},
        "digest of the data": facts.data.get("digest", ""),
        "states": "" if states == "auto" else f"rounded to {states} on their way to the trainer",
        "loss": str(facts.config.get("draft", {}).get("loss", "")),
        "changes": "; ".join(facts.changes),
        "made with": ", ".join(f"{name} {version}" for name, version in facts.machine.items()),
        "acceptance length": _measured(evaluated),
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items() if value)]
    try:
        readme = (draft / README).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        readme = ""
    _write(draft / README, with_section(readme, "Training", [*lines, "", f"`{PROVENANCE}` has all of it."]).encode())


def _measured(evaluated: EvalFacts | None) -> str:
    if evaluated is None:
        return "not measured; `specd eval DRAFT` does"
    return (
        f"**{evaluated.acceptance_length:.2f}** on {evaluated.prompts} prompts, greedy, up to "
        f"{evaluated.max_new_tokens} tokens each, target in {evaluated.dtype or 'its dtype'}; {evaluated.identical} of "
        f"{evaluated.prompts} outputs are the target's own, token for token"
    )


def measured(found: Found) -> EvalFacts | None:
    """The newest evaluation that is kept with a draft."""
    file = found.home / EVALS["trained"]
    return load_facts(file, EvalFacts) if file.is_file() else None


def refresh(found: Found) -> None:
    """Bring the README of a found draft up to date, where the draft knows of its making."""
    if found.facts is not None:
        describe(found.directory, found.facts, measured(found))


def export(found: Found, to: Path) -> None:
    """Copy a draft to the directory `to`, which must not be there yet, with a README that is up to date.

    It appears whole; who may read it is up to the umask. Raises ConfigError for a place that is taken, CheckpointError
    when it cannot be written.
    """
    if to.exists():
        raise ConfigError(f"{str(to)!r} exists: choose another --to, or remove it")
    evaluated = measured(found)
    with writing(to, AGAIN):
        to.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{to.name}-", dir=to.parent))
        try:
            new = scratch / "new"
            shutil.copytree(found.directory, new, copy_function=shutil.copyfile)
            if found.facts is not None:
                describe(new, found.facts, evaluated)
            mask = os.umask(0)
            os.umask(mask)
            for place in (new, *new.rglob("*")):
                place.chmod((0o777 if place.is_dir() else 0o666) & ~mask)
                sync(place)
            new.rename(to)
            sync(to.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    """Write a file whole, in place of what is there."""
    with writing(path, AGAIN), replacing(path) as file:
        file.write(content)
