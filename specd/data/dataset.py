"""Training data: conversations, texts or token ids, prepared once as samples of tokens and labels."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import date
from itertools import islice
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from specd.config.settings import DataConfig
from specd.data import forms, store
from specd.data.batching import BatchPlan, check_budget, check_packing, random_keys
from specd.data.faults import Faults, RowError
from specd.data.images import Picture, decode
from specd.data.portion import Report as Report
from specd.data.rows import Row, fingerprint, locate, read_rows, sources
from specd.data.samples import Job, Maker, vocabulary
from specd.data.samples import trainable as trainable
from specd.data.workers import Chunk, portions
from specd.errors import ConfigError, DataError
from specd.paths import cache_dir

logger = logging.getLogger(__name__)

HELD_OUT = 3
"""What random numbers are for: `random_keys` of batching has the others."""
COUNTED = 1 << 24
"""Tokens that are counted at a time."""
CHUNK = 64
"""Rows that are tokenised together, by one process."""

_VERSION = "5"  # part of the cache key: raise it when the same rows would give other samples
_TOKENIZER_FILE = re.compile(
    r"(token|vocab|merges|special_|added_|chat_template|generation_config|preprocessor_config|"
    r"additional_chat_templates/).*"
    r"\.(json|jinja|model|txt|tiktoken)"
)
_CLOCK = b"strftime_now"
"""What a chat template calls that may want to know the day."""


class Dataset:
    """Samples by number. tokens: int32, the ids of sample i; loss_mask: bool, True where a token may be a label.

    rows: for each sample, its row, from 0; several files are counted through. digest: identity of the samples, and of
    how often they are trained, whatever file or path they came from.
    """

    __slots__ = ("_mask", "_pictures", "_starts", "_tokens", "digest", "report", "rows", "weights")

    def __init__(self, stored: store.Stored, weights: tuple[float, ...]) -> None:
        """weights: of each source of the report."""
        arrays, self.report, self.digest = stored
        self._tokens, self._mask, self._starts = arrays["tokens"], arrays["loss_mask"], arrays["starts"]
        self._pictures = tuple(arrays[name] for name in ("pictures", "picture_samples", "picture_ends"))
        self.rows: NDArray[np.int64] = arrays["rows"]
        self.weights: NDArray[np.float64] | None = None
        """How often an epoch trains each sample; None where it is once."""
        counts = (*self.report.sources, *[0] * (len(weights) - len(self.report.sources)))
        if any(weight != 1 for weight in weights):
            self.weights = np.repeat(np.array(weights), counts)
            shares = msgspec.json.encode([self.digest, counts, weights])
            self.digest = hashlib.blake2b(shares, digest_size=16).hexdigest()

    def __len__(self) -> int:
        return self._starts.size - 1

    def __repr__(self) -> str:
        return f"Dataset({len(self)} samples, {self.report.tokens} tokens, {self.digest})"

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample."""
        return np.diff(self._starts)

    def tokens(self, i: int) -> NDArray[np.int32]:
        return self._tokens[self._starts[i] : self._starts[i + 1]]

    def loss_mask(self, i: int) -> NDArray[np.bool_]:
        return self._mask[self._starts[i] : self._starts[i + 1]]

    def pictures(self, i: int) -> tuple[Picture, ...]:
        """The images of sample i."""
        data, samples, ends = self._pictures
        place = int(np.searchsorted(samples, i))
        if place == samples.size or samples[place] != i:
            return ()
        return decode(data[ends[place - 1] if place else 0 : ends[place]].tobytes())

    @property
    def illustrated(self) -> bool:
        """Whether any sample has images."""
        return bool(self._pictures[1].size)

    def held_out(self, share: float, most: int, seed: int) -> NDArray[np.bool_]:
        """Which samples are held out of training: all those of so many rows, chosen by `seed`.

        share: of the rows that have a sample. most: rows at most.
        """
        rows = np.unique(self.rows)
        order = np.argsort(random_keys(rows.size, seed, 0, HELD_OUT), kind="stable")
        return np.isin(self.rows, rows[order[: min(most, int(share * rows.size))]])

    def label_counts(self, vocab_size: int, held: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
        """How often each token is a label of a sample that is not held out, int64 [vocab_size]."""
        counts = np.zeros(vocab_size, np.int64)
        for begin in range(0, self._tokens.size, COUNTED):
            part = slice(begin, begin + COUNTED)
            counts += np.bincount(self._tokens[part][self._mask[part]], minlength=vocab_size)
        for i in () if held is None else np.flatnonzero(held).tolist():
            counts -= np.bincount(self.tokens(i)[self.loss_mask(i)], minlength=vocab_size)
        return counts

    def plan(self, config: DataConfig, seed: int, held: NDArray[np.bool_] | None = None) -> BatchPlan:
        """The order in which these samples are trained, without those held out.

        Raises ConfigError as BatchPlan does.
        """
        weights = self.weights
        if held is not None and held.any():
            weights = np.where(held, 0.0, 1.0 if weights is None else weights)
        return BatchPlan(
            self.lengths, config.batch_tokens, config.max_batch_sequences, seed, weights, packing=config.packing
        )

    def plan_of(self, held: NDArray[np.bool_], config: DataConfig, seed: int) -> BatchPlan:
        """Batches of the samples that are held out, each once an epoch; epoch 0 is all that is needed."""
        only = held.astype(np.float64)
        return BatchPlan(self.lengths, config.batch_tokens, config.max_batch_sequences, seed, only)

    def find(self, token: int) -> tuple[int, int]:
        """How often `token` is in the samples, and the first row (from 0) that has it; (0, 0) for none."""
        count, first = 0, -1
        for at in range(0, self._tokens.size, _SCAN):
            places = np.flatnonzero(self._tokens[at : at + _SCAN] == token)
            if places.size and first < 0:
                first = at + int(places[0])
            count += places.size
        row = int(self.rows[np.searchsorted(self._starts, first, side="right") - 1]) if count else 0
        return count, row


_SCAN = 1 << 20


def check(config: DataConfig) -> None:
    """Raise ConfigError or DataError for settings that cannot be used; reads no rows, contacts no hub."""
    if config.max_length < 2 or config.max_samples < 0:
        raise ConfigError(
            f"data.max_length={config.max_length}, data.max_samples={config.max_samples}: expected a length of at "
            f"least 2 tokens, and a number of samples or 0 for all"
        )
    check_budget(config.batch_tokens, config.max_batch_sequences)
    check_packing(config.packing, config.weights)
    forms.check(config)
    for source in sources(config):
        locate(source.path)


def dated(config: DataConfig, tokenizer_dir: Path) -> DataConfig:
    """`config` with a date where the chat template writes one: the day on which the run begins, unless one is given.

    Without one it is the same data every day, so `date` stays as it is.
    """
    if config.date or not any(_CLOCK in file.read_bytes() for file in _tokenizer_files(tokenizer_dir)):
        return config
    if not Maker(Job(config, tokenizer_dir, 1)).chat.asks_clock:
        return config
    today = date.today().isoformat()
    logger.warning(
        "the chat template asks for the date: it is told %s, and a run that is resumed keeps it; set data.date for "
        "another",
        today,
    )
    return replace(config, date=today)


def prepare(
    config: DataConfig,
    tokenizer_dir: Path,
    *,
    consecutive_labels: int = 1,
    on_rows: Callable[[int], None] | None = None,
) -> Dataset:
    """The samples of `config.path` for the tokenizer in `tokenizer_dir`, from the cache if they are there.

    consecutive_labels: a sample with fewer labels in a row is left out. on_rows: called with the rows read so far.
    Raises DataError that counts the rows which cannot be used, unless they are to be skipped; ConfigError as `check`.
    """
    check(config)
    job = Job(dated(config, tokenizer_dir), tokenizer_dir, consecutive_labels)
    home = Path(os.path.expanduser(config.cache_dir)) if config.cache_dir else cache_dir() / "data"
    key = _key(job)
    stored = store.load(home / key) or _build(job, home, key, on_rows or (lambda rows: None))
    report, path = stored.report, _path(config)
    _judge(config, report)
    logger.info("%s: %d samples, %d tokens", path, report.samples, report.tokens)
    if report.cut:
        logger.warning("%s: %d samples are cut to %d tokens", path, report.cut, config.max_length)
    if report.split:
        logger.info("%s: long documents are split, into %d samples more", path, report.split)
    if report.without_labels:
        logger.warning("%s: %d rows are left out, they have no trainable tokens", path, report.without_labels)
    if report.dropped:
        logger.warning(
            "%s: the chat template leaves out a part of %d answers, as thoughts of earlier turns", path, report.dropped
        )
    for fault in report.bad:
        logger.warning("%s: %d rows are left out: %s, the first: %s", path, fault.rows, fault.kind, fault.first)
    return Dataset(stored, tuple(source.weight for source in sources(config)))


def sample(config: DataConfig, tokenizer_dir: Path, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens and loss mask of row `number` (from 1) for inspection: uncut, with labels or without.

    Raises DataError for a row that cannot be used, and when there are fewer.
    """
    maker = Maker(Job(dated(config, tokenizer_dir), tokenizer_dir, 1))
    for coded in maker.coded([row for row, _ in islice(_rows(config), number - 1, number)]):
        if isinstance(coded, RowError):
            raise coded
        return coded.tokens, coded.loss_mask
    raise DataError(f"{_path(config)} has no row {number}; rows count from 1")


def _build(job: Job, home: Path, key: str, on_rows: Callable[[int], None]) -> store.Stored:
    """Read every row once; memory is that of a few chunks."""
    report = Report()
    origins: deque[int] = deque()
    with (
        store.Scratch(home) as scratch,
        closing(portions(job, _chunks(job.config, origins), job.config.processes)) as made,
    ):
        for portion in made:
            scratch.add(portion, report.rows)
            report = report.plus(portion.report, origins.popleft())
            on_rows(report.rows)
        if not report.samples:
            _judge(job.config, report)
            raise DataError(
                f"none of the {report.rows} rows of {_path(job.config)} has trainable tokens within data.max_length="
                f"{job.config.max_length}; expected conversations with assistant turns (see `specd data show`)"
                + "".join(f"; {fault.rows} rows: {fault.kind}, the first: {fault.first}" for fault in report.bad)
            )
        return scratch.keep(key, report)


def _judge(config: DataConfig, report: Report) -> None:
    """Raise DataError for rows that cannot be used, unless they are to be skipped."""
    if config.bad_rows == "stop":
        faults = Faults()
        faults.merge(report.bad)
        faults.stop(_path(config), report.rows)


def _rows(config: DataConfig) -> Iterator[tuple[Row, int]]:
    """Each row, and the number of its source."""
    every = ((row, number) for number, source in enumerate(sources(config)) for row in read_rows(source))
    return islice(every, config.max_samples or None)


def _chunks(config: DataConfig, origins: deque[int]) -> Iterator[Chunk]:
    """The rows of one source after the other, some at a time; `origins` gets the source of each chunk."""
    chunk: Chunk = []
    source = 0
    for row, number in _rows(config):
        if chunk and (len(chunk) == CHUNK or number != source):
            origins.append(source)
            yield chunk
            chunk = []
        source = number
        chunk.append(row)
    if chunk:
        origins.append(source)
        yield chunk


def _path(config: DataConfig) -> str:
    return config.path if isinstance(config.path, str) else ", ".join(config.path)


def _tokenizer_files(directory: Path) -> list[Path]:
    """The files in `directory` that tokens and labels depend on."""
    found = (*directory.glob("*"), *directory.glob("additional_chat_templates/*"))
    names = sorted(str(file.relative_to(directory)) for file in found if file.is_file())
    return [directory / name for name in names if _TOKENIZER_FILE.fullmatch(name)]


def _key(job: Job) -> str:
    """Cache key of the prepared data: a digest of all that the samples depend on."""
    config, directory, consecutive_labels = job
    digest = hashlib.blake2b(digest_size=16)
    options = (
        config.format, config.columns, config.last_turn_only, config.max_length, config.long, config.max_samples,
        config.template, config.date, consecutive_labels, vocabulary(directory),
    )  # fmt: skip
    digest.update(
        msgspec.json.encode([_VERSION, [fingerprint(source) for source in sources(config)], options], order="sorted")
    )
    for file in _tokenizer_files(directory):
        digest.update(f"{file.relative_to(directory)}:{file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()
