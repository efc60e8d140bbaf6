"""Training data: conversations, texts or token ids, prepared once as samples of tokens and labels."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.config.settings import DataConfig
from specd.data import forms
from specd.data.batching import BatchPlan, check_budget
from specd.data.chat import Chat, Rendered
from specd.data.faults import RowError
from specd.data.rows import Row, fingerprint, locate, read_rows, sources
from specd.data.tokenizer import Encoder, load_tokenizer
from specd.errors import ConfigError, DataError
from specd.paths import cache_dir

logger = logging.getLogger(__name__)

COUNTED = 1 << 24
"""Tokens that are counted at a time."""
CHUNK = 512
"""Rows that are tokenised together; the tokenizer spreads them over the cores."""

_VERSION = "3"  # part of the cache key: raise it when the same rows would give other samples
_TOKENIZER_FILE = re.compile(r"(token|vocab|merges|special_|added_|chat_template).*\.(json|jinja|model|txt|tiktoken)")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a prepared data file.

    rows: read. samples, tokens, trainable_tokens: in the data set; a trainable token is one under the loss mask.
    cut: samples longer than max_length. without_labels: rows left out, with fewer consecutive labels than the draft
    needs. forms: samples by their `form` column, where they have one.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    cut: int = 0
    without_labels: int = 0
    forms: dict[str, int] = {}


class Dataset:
    """Samples by number. tokens: int32, the ids of sample i; loss_mask: bool, True where a token may be a label.

    rows: for each sample, its row in the file, from 0. digest: identity of the samples, whatever file or path they
    came from.
    """

    __slots__ = ("_mask", "_starts", "_tokens", "digest", "report", "rows")

    def __init__(self, arrays: Mapping[str, NDArray[Any]], report: Report, digest: str) -> None:
        self._tokens, self._mask, self._starts = arrays["tokens"], arrays["loss_mask"], arrays["starts"]
        self.rows: NDArray[np.int64] = arrays["rows"]
        self.report, self.digest = report, digest

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

    def label_counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token is a label, int64 [vocab_size]."""
        counts = np.zeros(vocab_size, np.int64)
        for begin in range(0, self._tokens.size, COUNTED):
            part = slice(begin, begin + COUNTED)
            counts += np.bincount(self._tokens[part][self._mask[part]], minlength=vocab_size)
        return counts

    def plan(self, config: DataConfig, seed: int) -> BatchPlan:
        """The order in which these samples are trained. Raises ConfigError for a budget that a sample exceeds."""
        return BatchPlan(self.lengths, config.batch_tokens, config.max_batch_sequences, seed)


def check(config: DataConfig) -> None:
    """Raise ConfigError or DataError for settings that cannot be used; reads no rows, contacts no hub."""
    if config.max_length < 2 or config.max_samples < 0:
        raise ConfigError(
            f"data.max_length={config.max_length}, data.max_samples={config.max_samples}: expected a length of at "
            f"least 2 tokens, and a number of samples or 0 for all"
        )
    check_budget(config.batch_tokens, config.max_batch_sequences)
    for source in sources(config):
        locate(source.path)


def prepare(
    config: DataConfig,
    tokenizer_dir: Path,
    *,
    consecutive_labels: int = 1,
    on_rows: Callable[[int], None] | None = None,
) -> Dataset:
    """The samples of `config.path` for the tokenizer in `tokenizer_dir`, from the cache if they are there.

    consecutive_labels: a sample with fewer labels in a row is left out. on_rows: called with the rows read so far,
    every CHUNK rows. Raises DataError that names the row for data that cannot be used, ConfigError as `check`.
    """
    check(config)
    home = Path(config.cache_dir).expanduser() if config.cache_dir else cache_dir() / "data"
    place = home / _key(config, tokenizer_dir, consecutive_labels)
    dataset = _load(place)
    if dataset is None:
        arrays, report = _build(config, tokenizer_dir, consecutive_labels, on_rows)
        dataset = Dataset(arrays, report, _digest(arrays))
        _store(place, arrays, report)
    report = dataset.report
    logger.info("%s: %d samples, %d tokens", config.path, report.samples, report.tokens)
    if report.cut:
        logger.warning("%s: %d samples are cut to %d tokens", config.path, report.cut, config.max_length)
    if report.without_labels:
        logger.warning("%s: %d rows are left out, they have no trainable tokens", config.path, report.without_labels)
    return dataset


def sample(config: DataConfig, tokenizer_dir: Path, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens and loss mask of row `number` (from 1) for inspection: uncut, with labels or without.

    Raises DataError when there are fewer rows.
    """
    for _, tokens, mask in _samples(config, tokenizer_dir, islice(_rows(config), number - 1, number)):
        return tokens, mask
    raise DataError(f"{config.path} has no row {number}; rows count from 1")


def trainable(mask: NDArray[np.bool_], consecutive_labels: int) -> bool:
    """Whether `mask` has `consecutive_labels` labels in a row."""
    for _ in range(consecutive_labels - 1):
        mask = mask[1:] & mask[:-1]
    return bool(mask.any())


def _build(
    config: DataConfig, tokenizer_dir: Path, consecutive_labels: int, on_rows: Callable[[int], None] | None
) -> tuple[dict[str, NDArray[Any]], Report]:
    """Tokenise every row. Samples without labels are left out, and counted."""
    samples: list[tuple[NDArray[np.int32], NDArray[np.bool_]]] = []
    kept: list[int] = []
    forms: dict[str, int] = {}
    rows = cut = 0
    for form, tokens, mask in _samples(config, tokenizer_dir, _rows(config)):
        rows += 1
        if on_rows is not None and rows % CHUNK == 0:
            on_rows(rows)
        shown, labels = tokens[: config.max_length], mask[: config.max_length]
        if not trainable(labels, consecutive_labels):
            continue
        cut += tokens.size > config.max_length
        samples.append((shown, labels))
        kept.append(rows - 1)
        if form:
            forms[form] = forms.get(form, 0) + 1
    if not samples:
        raise DataError(
            f"none of the {rows} rows of {config.path} has trainable tokens within data.max_length="
            f"{config.max_length}; expected conversations with assistant turns (see `specd data show`)"
        )
    arrays: dict[str, NDArray[Any]] = {
        "tokens": np.concatenate([tokens for tokens, _ in samples]),
        "loss_mask": np.concatenate([mask for _, mask in samples]),
        "starts": np.cumsum([0, *(tokens.size for tokens, _ in samples)], dtype=np.int64),
        "rows": np.array(kept, np.int64),
    }
    return arrays, Report(
        rows=rows,
        samples=len(samples),
        tokens=int(arrays["tokens"].size),
        trainable_tokens=int(arrays["loss_mask"].sum()),
        cut=cut,
        without_labels=rows - len(samples),
        forms=forms,
    )


def _rows(config: DataConfig) -> Iterator[Row]:
    rows = chain.from_iterable(read_rows(source) for source in sources(config))
    return islice(rows, config.max_samples or None)


def _samples(
    config: DataConfig, tokenizer_dir: Path, rows: Iterator[Row]
) -> Iterator[tuple[str, NDArray[np.int32], NDArray[np.bool_]]]:
    """(form, tokens, loss mask) of every row, uncut."""
    size = _vocabulary(tokenizer_dir)
    encoder: Encoder | None = None
    chat: Chat | None = None
    while chunk := list(islice(rows, CHUNK)):
        names = [str(row.get("form") or "") for _, row in chunk]
        found = [forms.read(row, where, config) for where, row in chunk]
        if encoder is None and any(not isinstance(form, forms.Tokens) for form in found):
            encoder = Encoder(load_tokenizer(tokenizer_dir))
            chat = Chat(encoder.tokenizer, config.template)
        texts: list[Rendered] = []
        for (where, _), form in zip(chunk, found, strict=True):
            if isinstance(form, forms.Conversation) and chat is not None:
                texts.append(chat.conversation(form, where, last_turn_only=config.last_turn_only))
            elif isinstance(form, forms.Text) and chat is not None:
                texts.append(chat.preformatted(form.text, last_turn_only=config.last_turn_only))
        coded = iter(encoder.encode(texts) if encoder else ())
        for name, (where, _), form in zip(names, chunk, found, strict=True):
            yield name, *(_tokens(form, where, size) if isinstance(form, forms.Tokens) else next(coded))


def _vocabulary(tokenizer_dir: Path) -> int:
    """Size of the target's vocabulary, from the config.json beside its tokenizer; else the tokenizer's own."""
    try:
        shape = msgspec.json.decode((tokenizer_dir / "config.json").read_bytes(), type=dict[str, Any])
        return int({**shape, **(shape.get("text_config") or {})}["vocab_size"])
    except (OSError, KeyError, TypeError, ValueError, msgspec.MsgspecError):
        return Encoder(load_tokenizer(tokenizer_dir)).size


def _tokens(form: forms.Tokens, where: str, size: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens and mask of a tokenised row. size: of the vocabulary."""
    if form.ids.size and form.ids.max() >= size:
        found = f"`input_ids` holds {form.ids.max()}; expected tokens from 0 to {size - 1}, as the target has"
        raise RowError(where, "token beyond the vocabulary", found)
    return form.ids.astype(np.int32), form.loss_mask


def _key(config: DataConfig, tokenizer_dir: Path, consecutive_labels: int) -> str:
    """Cache key of the prepared data: a digest of all that the samples depend on."""
    digest = hashlib.blake2b(digest_size=16)
    options = (
        config.format, config.last_turn_only, config.max_length, config.max_samples, config.template,
        consecutive_labels,
    )  # fmt: skip
    digest.update(
        msgspec.json.encode([_VERSION, [fingerprint(source) for source in sources(config)], options], order="sorted")
    )
    for file in sorted(tokenizer_dir.iterdir()):
        if _TOKENIZER_FILE.fullmatch(file.name):
            digest.update(f"{file.name}:{file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in ("tokens", "loss_mask", "starts"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


_ARRAYS: Iterable[tuple[str, type[Any]]] = (
    ("tokens", np.int32),
    ("loss_mask", np.bool_),
    ("starts", np.int64),
    ("rows", np.int64),
)


def _load(place: Path) -> Dataset | None:
    """The data set cached at `place`, its arrays memory-mapped; None when it is missing or damaged."""
    if not place.is_dir():
        return None
    try:
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name, _ in _ARRAYS}
        report = msgspec.json.decode((place / "report.json").read_bytes(), type=Report)
        for name, kind in _ARRAYS:
            if arrays[name].dtype != kind or arrays[name].ndim != 1:
                raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
        if not arrays["starts"][-1] == arrays["tokens"].size == arrays["loss_mask"].size == report.tokens:
            raise ValueError("the arrays do not belong together")
    except (OSError, ValueError, EOFError, IndexError, msgspec.MsgspecError) as error:
        logger.warning("cached data in %s is damaged (%s); preparing it again", place, error)
        shutil.rmtree(place, ignore_errors=True)
        return None
    return Dataset(arrays, report, _digest(arrays))


def _store(place: Path, arrays: Mapping[str, NDArray[Any]], report: Report) -> None:
    """Cache prepared data; a failure is logged and only costs preparing it again."""
    scratch: Path | None = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=place.parent))
        for name, array in arrays.items():
            np.save(scratch / f"{name}.npy", array, allow_pickle=False)
        (scratch / "report.json").write_bytes(msgspec.json.encode(report))
        os.rename(scratch, place)  # fails when another process was first, with the same content
    except OSError as error:
        if not place.is_dir():
            logger.warning("cannot keep prepared data in %s: %s; set data.cache_dir", place, error.strerror)
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
