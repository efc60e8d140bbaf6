"""What a run trains on: its data, prepared for its target, and the settings that follow from both."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from specd.client.subscriber import Subscriber
from specd.config.settings import Config, RunConfig
from specd.data import mask_token
from specd.data.dataset import Dataset, dated, prepare
from specd.data.portion import Report
from specd.data.progress import progress
from specd.data.rows import DEMO
from specd.drafts.base import TargetParts
from specd.protocol.contract import ReplayInfo
from specd.train.distributed import Ranks
from specd.train.validation import Held, held_out

_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
"""How configs call the number of positions that a model was trained for."""

logger = logging.getLogger(__name__)


class Keeper(Protocol):
    """A source of states, as far as it is known what its daemons keep; as a Subscriber has it."""

    @property
    def replay(self) -> ReplayInfo | None: ...

    @property
    def stands_by(self) -> bool: ...


class Prepared(NamedTuple):
    """The run's settings and its draft's, with nothing left to be chosen, its samples, and what is held out of them."""

    config: RunConfig
    draft: Config
    dataset: Dataset
    held: Held


def prepared(
    config: RunConfig,
    draft: Config,
    files: Path,
    vocabulary: int,
    target: str,
    *,
    consecutive_labels: int,
    begun: RunConfig | None = None,
    show: bool = False,
) -> Prepared:
    """The data of a run, for the target whose files lie in `files`.

    vocabulary: rows of its embedding. target: its name. begun: the settings of the run as it began, which a date, a
    mask token and a held-out share that are left to specd are taken from. show: a bar on the terminal.
    Raises ConfigError for a mask token that cannot be one, and what `prepare` raises.
    """
    config, draft = kept(config, draft, begun)
    config = replace(config, data=dated(config.data, files))
    free = check_mask(draft, files, vocabulary, target) if begun is None or mask_of(draft) == -1 else []
    with progress("preparing data", show) as on_rows:
        dataset = prepare(config.data, files, consecutive_labels=consecutive_labels, on_rows=on_rows)
    if free:
        chosen = mask_token.choose(free, dataset)
        logger.info("mask token %d: %s", chosen.id, chosen.reason)
        draft = replace(draft, mask_token_id=chosen.id)
    elif begun is None and (mask := mask_of(draft)) is not None:
        mask_token.check_absent(mask, dataset)
    validation, held = held_out(config.validation, dataset, config.train.seed)
    settled = replace(config, draft=msgspec.to_builtins(draft), validation=validation)
    return Prepared(settled, draft, dataset, held)


def with_date(config: RunConfig, draft: Config, begun: RunConfig | None, files: Path, ranks: Ranks) -> RunConfig:
    """`config` with the date that rank 0 takes, where one is needed: a day may end while ranks start. As `prepared`."""

    def chosen() -> str:
        return dated(kept(config, draft, begun)[0].data, files).date

    return replace(config, data=replace(config.data, date=ranks.decide("date", chosen)))


def target_parts(subscriber: Subscriber, config: dict[str, object], dataset: Dataset, held: Held) -> TargetParts:
    """What a draft may have of the target. config: its config.json. Labels are counted where they are trained."""
    contract = subscriber.contract
    embedding = subscriber.tensor("embedding")
    tied = contract.artifacts["lm_head"].same_as == "embedding"
    lm_head = embedding if tied else subscriber.tensor("lm_head")
    return TargetParts(contract, config, embedding, lm_head, dataset.label_counts(contract.vocab_size, held.samples))


def warn_of_length(longest: int, target: Mapping[str, Any], name: str) -> None:
    """Warn where samples are longer than what a target was trained for. longest: in tokens; target: its config.json."""
    text = {**target, **(target.get("text_config") or {})}
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    made_for = next((text[key] for key in _LENGTHS if isinstance(text.get(key), int)), 0)
    before = text.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or 0
    if made_for and longest > made_for:
        logger.warning(
            "the longest sample has %d tokens, and %s was made for up to %d: its states beyond are not those of a "
            "target in use; lower data.max_length", longest, name, made_for,
        )  # fmt: skip
    elif rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic") and before and longest > before:
        logger.warning(
            "the longest sample has %d tokens, and %s turns to other rotary frequencies beyond %d: a draft sees both, "
            "each sample by its own length; data.max_length=%d keeps to one", longest, name, before, before,
        )  # fmt: skip


def warn_of_packing(config: RunConfig, source: Keeper) -> None:
    """Warn where a daemon keeps states that no later epoch asks it for."""
    if source.replay is None or config.train.epochs == 1:
        return
    if config.data.packing == "anew":
        logger.warning(
            "the daemon keeps states, but data.packing=anew makes every epoch's batches new, so none of them is "
            "replayed within this run: a new run with --set data.packing=fixed has the same ones in every epoch"
        )
    elif source.stands_by:
        logger.warning(
            "daemons keep states, but subscriber.place=near has each rank ask its own, and a batch comes to another "
            "rank each epoch, so most are computed and kept more than once: with --set subscriber.place=all each comes "
            "back to the daemon that keeps it"
        )


def kept(config: RunConfig, draft: Config, begun: RunConfig | None) -> tuple[RunConfig, Config]:
    """The settings, with date, mask token and held-out share that the run began with where they are left to specd."""
    if begun is None:
        return config, draft
    config = replace(config, data=replace(config.data, date=config.data.date or begun.data.date))
    if config.validation.share == "auto":  # a run from before rows were held out has no share
        share = 0.0 if begun.validation.share == "auto" else begun.validation.share
        config = replace(config, validation=replace(config.validation, share=share))
    before = begun.draft.get("mask_token_id", -1)
    if mask_of(draft) == -1 and isinstance(before, int) and before >= 0:
        draft = replace(draft, mask_token_id=before)
    return config, draft


def check_mask(draft: Config, files: Path, vocabulary: int, target: str) -> list[mask_token.MaskToken]:
    """The mask tokens to choose from, if that is left to specd; none for a draft that names one, or takes none.

    Raises ConfigError for one that the target writes, or when none can be chosen.
    """
    mask = mask_of(draft)
    if mask == -1:
        return mask_token.candidates(files, vocabulary, target)
    if mask is not None:
        mask_token.check_unwritten(mask, files)
    return []


def mask_of(draft: Config) -> int | None:
    """The mask token in the settings of a draft, −1 where it is to be chosen; None for a draft that takes none.

    None, too, where it is that of the draft that this one begins with.
    """
    mask: int | None = getattr(draft, "mask_token_id", None)
    init: str = getattr(draft, "init", "")
    return None if mask == -1 and init else mask


def data_facts(path: str | tuple[str, ...], dataset: Dataset, held: Held | None = None) -> dict[str, Any]:
    """The data of a run, for run.json and the report."""
    report: Report = dataset.report
    facts: dict[str, Any] = {
        "path": path if isinstance(path, str) else ", ".join(path),
        "rows": f"{report.rows:,}",
        "samples": f"{report.samples:,}",
        "tokens": f"{report.tokens:,}",
        "trainable tokens": f"{report.trainable_tokens:,}",
        "cut to max_length": report.cut,
        "left out, without labels": report.without_labels,
        "left out, cannot be used": report.num_bad,
    }
    if held is not None and held.rows:
        facts["held out for validation"] = f"{held.rows:,} rows, {held.count:,} samples"
    for fault in report.bad:
        facts[f"cannot be used: {fault.kind}"] = f"{fault.rows:,}, the first: {fault.first}"
    if report.split:
        facts["more samples of split documents"] = report.split
    if report.dropped:
        facts["answers in part left out by the template"] = report.dropped
    return facts | {"digest": dataset.digest}


def with_dtype(config: RunConfig, device: str) -> RunConfig:
    """`config` with a dtype for `auto`: bfloat16 on a GPU and float32 on a CPU, where bfloat16 is emulated."""
    if config.train.dtype != "auto":
        return config
    dtype: Literal["float32", "bfloat16"] = "float32" if device == "cpu" else "bfloat16"
    return replace(config, train=replace(config.train, dtype=dtype))


def with_data(config: RunConfig, target: str) -> RunConfig:
    """`config` with specd's own conversations where it names no data, and one line that says so."""
    if config.data.path:
        return config
    logger.warning(
        "no data given: training on the conversations that come with specd (%s), whose answers are not %s's own, so "
        "this only shows the path; for a draft worth serving give --data FILE with answers of %s, as `specd data "
        "regenerate FILE --model %s --output FILE` writes them",
        DEMO, target, target, target,
    )  # fmt: skip
    return replace(config, data=replace(config.data, path=DEMO))
