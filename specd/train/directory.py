"""The directory of a run: what is in it, when a run may use it, and what a resumed run must share with the first."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from specd.config.load import as_begun, convert
from specd.config.settings import Config, RunConfig
from specd.drafts.directory import digest, draft_directory
from specd.drafts.initial import FACT, began_with
from specd.errors import CheckpointError, ConfigError, ProtocolError, writing
from specd.evaluate.results import EVALS, load_facts
from specd.paths import being_written, replacing
from specd.protocol.contract import TEMPLATES, TargetContract, is_file_name
from specd.train.checkpoint import Identity
from specd.train.journal import read
from specd.train.owner import LOCK
from specd.version import __version__

logger = logging.getLogger(__name__)

FACTS, JOURNAL, VALIDATION = "run.json", "metrics.jsonl", "validation.jsonl"

FREE: dict[str, set[str]] = {
    "capture": set(),
    "data": {"path", "cache_dir", "processes", "bad_rows"},
    "train": {"device", "threads", "save_every", "keep", "log_every", "collectives", "peer_patience_s"},
    "validation": {"every", "patience", "decode_every", "prompts", "max_new_tokens"},
}
"""Settings that a resumed run may change: they do not affect what is computed. All others of these sections are fixed.

The draft's free settings are its method's to name.

Those of `target` are free, wherever it is hosted: what affects its states, as its dtype, is in its fingerprint.
"""


class RunDirectory:
    """run.json, metrics.jsonl, validation.jsonl, checkpoints/, tb/, draft/ and report.html of one run.

    run.json is written first, once all settings are checked: before it there is nothing but the lock of its owner
    (`owned` of `train/owner.py`), who alone calls what writes.
    """

    __slots__ = ("path",)

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @property
    def journal(self) -> Path:
        return self.path / JOURNAL

    @property
    def validation(self) -> Path:
        return self.path / VALIDATION

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def draft(self) -> Path:
        return self.path / "draft"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def begun(self) -> bool:
        """Whether it holds a run."""
        return (self.path / FACTS).is_file()

    def check(self, resume: bool) -> bool:
        """Whether there is a run to go on with. resume: whether one may be; without one a new run begins.

        Raises ConfigError when a new run would overwrite something, CheckpointError for a journal that is no run's.
        """
        if resume and self.begun:
            if self.journal.exists():
                read(self.journal)
            return True
        if any(path not in (self.path / LOCK, being_written(self.path / FACTS)) for path in self.path.iterdir()):
            go_on = f"go on with that run by `specd resume {shlex.quote(str(self.path))}`, "
            remedy = go_on if self.begun else "it holds no run to resume: " * resume
            raise ConfigError(
                f"output {str(self.path)!r} exists and is not empty: {remedy}choose another --output, or remove it"
            )
        return False

    def settings(self) -> RunConfig | None:
        """The settings that its run began with, None where they cannot be read."""
        try:
            return convert(read_facts(self.path).config, RunConfig, FACTS)
        except (CheckpointError, ConfigError):
            return None

    def began_by(self, launcher: str) -> bool:
        """Whether it holds a run that this launcher began: then it may go on when the launcher starts again."""
        try:
            return read_facts(self.path).launcher == launcher
        except CheckpointError:
            return False

    def finished(self) -> RunFacts | None:
        """The facts of a run that was trained and exported to its end; None for any other."""
        try:
            facts = read_facts(self.path)
        except CheckpointError:
            return None
        return facts if facts.finished and self.draft.is_dir() else None

    def reopen(self, config: RunConfig, change: str = "") -> RunFacts:
        """Note that the run goes on, under which settings, and how they change its plan; returns its facts.

        What a finished run left behind, its draft and the evaluations of that, is put aside as `draft-STEP`.
        """
        old = read_facts(self.path)
        changes = (*old.changes, change) if change else old.changes
        facts = replace(old, finished="", config=msgspec.to_builtins(config), changes=changes)
        if old.finished and self.draft.is_dir() and change:
            aside = self.path / f"draft-{len(read(self.journal)):08d}"
            with writing(aside):
                shutil.rmtree(aside, ignore_errors=True)
                self.draft.rename(aside)
                for name in EVALS.values():
                    if (self.path / name).is_file():
                        (self.path / name).replace(aside / name)
            logger.info("the draft that the run had is in %s", aside)
        write_facts(self.path, facts)
        return facts

    def finish(self) -> None:
        """Note in run.json that the run is finished."""
        try:
            facts = read_facts(self.path)
        except CheckpointError as error:  # nothing else of the run needs it
            logger.warning("the run is not marked as finished: %s", error)
            return
        write_facts(self.path, replace(facts, finished=utc()))

    def has_checkpoint(self, save_every: int) -> bool:
        """Whether there is a checkpoint to resume from.

        A run killed before its first checkpoint was due starts over. Raises CheckpointError if a due one is missing.
        """
        if any(self.checkpoints.glob("step-*")):
            return True
        steps = len(read(self.journal)) if self.journal.exists() else 0
        if save_every and steps > save_every:  # the step itself is logged before its checkpoint exists
            raise CheckpointError(
                f"{self.journal} has {steps} steps but there is no checkpoint in {self.checkpoints}: "
                f"restore one, or start a new run in another --output"
            )
        logger.info("no checkpoint yet in %s: starting at step 0", self.checkpoints)
        return False


def target_files(contract: TargetContract, fetch: Callable[[str], bytes], directory: Path) -> dict[str, bytes]:
    """Fetch the target's files (config, tokenizer), write them into `directory` and return them by name.

    Raises ProtocolError for a name that is a path, other than a chat template's.
    """
    files: dict[str, bytes] = {}
    for name, ref in contract.artifacts.items():
        if ref.dtype:
            continue
        if not is_file_name(name):
            raise ProtocolError(
                f"the daemon offers an artifact called {name!r}: expected a plain file name, or a chat template's in "
                f"{TEMPLATES}"
            )
        files[name] = fetch(name)
        with writing(directory / name):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(files[name])
    return files


def identity(config: RunConfig, draft: Config, free: frozenset[str], contract: TargetContract, data: str) -> Identity:
    """The Identity of this run's checkpoints. data: digest of the samples, whatever path they come from.

    A draft that the run begins with is known by its content, too. The rest as `fixed`, which see.
    """
    settings = {"data.digest": data} | fixed(config, draft, free)
    if init := settings.get("draft.init"):
        settings["draft.init"] = digest(draft_directory(init))
    return Identity(target=contract.fingerprint, settings=settings)


def fixed(config: RunConfig, draft: Config, free: frozenset[str]) -> dict[str, Any]:
    """The settings that a resumed run must share with the first, by flat `a.b` names.

    config: with train.dtype resolved, not `auto`, as the device may change. draft: the settings of the draft, free:
    those of them that may change.
    """
    assert config.train.dtype != "auto", "resolve the dtype for the device first"
    settings: dict[str, Any] = {"method": config.method}
    sections = {name: (getattr(config, name), names) for name, names in FREE.items()} | {"draft": (draft, free)}
    for section, (struct, names) in sections.items():
        values: Mapping[str, Any] = msgspec.to_builtins(struct)
        settings |= {f"{section}.{key}": value for key, value in values.items() if key not in names}
    if settings["validation.share"] in ("auto", 0):  # `auto` is of a run from before rows were held out
        settings["validation.share"] = 0.0
        del settings["validation.rows"]
    return settings


class RunFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of a run. All values are for people to read; `config` is the full RunConfig.

    finished: when its draft was exported, empty before that. launcher: identity of the one that began it. directory:
    where its command was given, which relative paths in `config` start from. changes: what a resumed run had changed
    of its plan.
    """

    started: str
    finished: str = ""
    launcher: str = ""
    target: dict[str, Any]
    draft: dict[str, Any]
    data: dict[str, Any]
    transports: dict[str, str]
    machine: dict[str, str]
    config: dict[str, Any]
    directory: str = ""
    changes: tuple[str, ...] = ()


def beginning(facts: RunFacts) -> int | Path:
    """What the weights of a run began with: the seed they were drawn by, or the directory of another draft.

    Raises ConfigError when that draft is another one by now, CheckpointError when it is gone.
    """
    init = facts.config.get("draft", {}).get("init", "")
    return began_with(init, facts.draft.get(FACT, "")) if init else int(facts.config["train"]["seed"])


def machine_facts() -> dict[str, str]:
    """The machine and the versions that measurements depend on."""
    import torch

    facts = {
        "processor": f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores usable",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "GPU": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "specd": __version__,
    }
    return facts | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "pyzmq")}


def cpu_model() -> str:
    """The processor's name in /proc/cpuinfo, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def utc() -> str:
    """The time of day, for people."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def write_facts(run: Path, facts: RunFacts) -> None:
    """Write run.json, which the report reads beside the journal; it is there whole or not at all."""
    with writing(run / FACTS), replacing(run / FACTS) as file:
        file.write(msgspec.json.format(msgspec.json.encode(facts), indent=1) + b"\n")


def read_facts(run: Path) -> RunFacts:
    """The facts of a run. Raises CheckpointError when there are none."""
    facts = load_facts(run / FACTS, RunFacts)
    return replace(facts, config=as_begun(facts.config))
