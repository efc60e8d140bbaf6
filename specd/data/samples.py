"""Rows into samples: what a row holds, as text, as tokens and labels, in pieces that a draft can be trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.config.settings import DataConfig
from specd.data import forms
from specd.data.chat import Chat, Rendered, document
from specd.data.faults import Faults, RowError
from specd.data.images import Picture, Processor, encode, expanded
from specd.data.portion import Portion
from specd.data.rows import Row
from specd.data.tokenizer import Encoder, load_tokenizer


class Job(NamedTuple):
    """What all samples of a data set depend on, beside its rows. tokenizer_dir: the target's files."""

    config: DataConfig
    tokenizer_dir: Path
    consecutive_labels: int


class Coded(NamedTuple):
    """One row as tokens int32 [N] and their labels bool [N], uncut.

    document: it is one, so that it may be split. dropped: answers of which the template left out a part. pictures: its
    images; counts: how many tokens each takes. last: the tokens up to the last one of an image.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    document: bool
    dropped: int = 0
    pictures: tuple[Picture, ...] = ()
    counts: tuple[int, ...] = ()
    last: int = 0


class Maker:
    """Makes samples of rows. Tokenizer and template are read when the first row needs them."""

    __slots__ = ("_chat", "_encoder", "_processor", "_vocabulary", "job")

    def __init__(self, job: Job) -> None:
        self.job = job
        self._vocabulary = 0
        self._encoder: Encoder | None = None
        self._chat: Chat | None = None
        self._processor: Processor | None = None

    @property
    def vocabulary(self) -> int:
        """How many tokens the target knows: as its config.json says, else as many as its tokenizer."""
        if not self._vocabulary:
            self._vocabulary = vocabulary(self.job.tokenizer_dir) or self.encoder.size
        return self._vocabulary

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            self._encoder = Encoder(load_tokenizer(self.job.tokenizer_dir))
        return self._encoder

    @property
    def chat(self) -> Chat:
        if self._chat is None:
            self._chat = Chat(self.encoder.tokenizer, self.job.config.template, date=self.job.config.date)
        return self._chat

    @property
    def processor(self) -> Processor:
        """What reads images. Raises DataError where the target reads none."""
        if self._processor is None:
            self._processor = Processor(self.job.tokenizer_dir)
        return self._processor

    @property
    def reads_text(self) -> bool:
        """Whether a row has needed the tokenizer."""
        return self._encoder is not None

    def make(self, rows: Sequence[Row]) -> Portion:
        """The samples of `rows`: no longer than max_length, each with as many labels in a row as the draft needs."""
        config, needed = self.job.config, self.job.consecutive_labels
        faults = Faults()
        samples: list[tuple[int, NDArray[np.int32], NDArray[np.bool_]]] = []
        pictures: list[bytes] = []
        names: dict[str, int] = {}
        counts = {"cut": 0, "split": 0, "without_labels": 0, "dropped": 0}
        for number, ((where, row), coded) in enumerate(zip(rows, self.coded(rows), strict=True)):
            if isinstance(coded, RowError):
                faults.add(coded)
                continue
            if coded.last > config.max_length:
                detail = (
                    f"its {len(coded.pictures)} images reach to token {coded.last}, beyond data.max_length="
                    f"{config.max_length}; expected a larger one (an image cannot be cut), or smaller images"
                )
                faults.add(RowError(where, "images beyond data.max_length", detail))
                continue
            size, split = coded.tokens.size, coded.document and config.long == "split"
            bounds = pieces(size, config.max_length, needed) if split else [(0, min(size, config.max_length))]
            kept = [bound for bound in bounds if trainable(coded.loss_mask[slice(*bound)], needed)]
            samples += [(number, coded.tokens[slice(*bound)], coded.loss_mask[slice(*bound)]) for bound in kept]
            pictures += [encode(coded.pictures)] * len(kept)
            if not kept:
                counts["without_labels"] += 1
                continue
            counts["cut"] += size > config.max_length and not split
            counts["split"] += len(kept) - 1
            counts["dropped"] += coded.dropped
            if isinstance(row, dict) and row.get("form"):
                name = str(row["form"])
                names[name] = names.get(name, 0) + len(kept)
        return Portion.of(samples, tuple(pictures), rows=len(rows), bad=faults.found(), forms=names, **counts)

    def coded(self, rows: Sequence[Row]) -> Iterator[Coded | RowError]:
        """Each row as tokens, or why it cannot be used. Raises DataError where that is the tokenizer's fault."""
        read = [self._read(where, row) for where, row in rows]
        texts = [one for one in read if isinstance(one, Rendered)]
        encoded = iter(self.encoder.encode(texts) if texts else ())
        for (where, _), one in zip(rows, read, strict=True):
            if isinstance(one, RowError):
                yield one
                continue
            if isinstance(one, Rendered):
                try:
                    coded = self._illustrated(Coded(*next(encoded), one.document, one.dropped), one.pictures, where)
                except RowError as error:
                    yield error
                    continue
            else:
                coded = Coded(one.ids, one.loss_mask, bool(one.loss_mask.all()))  # type: ignore[arg-type]
            if coded.tokens.size and coded.tokens.max() >= self.vocabulary:
                yield self._beyond(where, one, int(coded.tokens.max()))
            else:
                yield coded._replace(tokens=coded.tokens.astype(np.int32, copy=False))

    def _read(self, where: str, row: dict[str, Any] | RowError) -> Rendered | forms.Tokens | RowError:
        if isinstance(row, RowError):
            return row
        config = self.job.config
        try:
            form = forms.read(row, where, config)
            if isinstance(form, forms.Tokens):
                return form
            if isinstance(form, forms.Conversation):
                if config.bad_rows == "skip" and not self.encoder.tokenizer.chat_template:
                    detail = "a conversation, and the target's tokenizer has no chat template; expected `text`"
                    raise RowError(where, "no chat template", detail)
                rendered = self.chat.conversation(form, where, last_turn_only=config.last_turn_only)
                return msgspec.structs.replace(rendered, pictures=form.pictures)
            if form.prompt:  # given, with its continuation behind it
                return document(form.text, form.prompt)
            return self._text(form.text)
        except RowError as error:
            return error

    def _illustrated(self, coded: Coded, pictures: tuple[Picture, ...], where: str) -> Coded:
        """A row with as many tokens for each of its images as it takes. Raises RowError for an image that is none."""
        if not pictures:
            return coded
        counts = tuple(self.processor.count(one, where)[0] for one in pictures)
        tokens, mask = expanded(coded.tokens, coded.loss_mask, counts, self.processor.token, where)
        last = int(np.flatnonzero(tokens == self.processor.token)[-1]) + 1
        return coded._replace(tokens=tokens, loss_mask=mask, pictures=pictures, counts=counts, last=last)

    def _text(self, text: str) -> Rendered:
        """A text: all labels where it is a document, without the BOS that it may begin with."""
        bos = str(self.encoder.tokenizer.bos_token or "")
        begin = len(bos) if bos and text.startswith(bos) else 0
        if not self.encoder.tokenizer.chat_template or self.chat.preformatted(text[begin:]).document:
            return msgspec.structs.replace(document(text), spans=((begin, len(text)),))
        return self.chat.preformatted(text, last_turn_only=self.job.config.last_turn_only)

    def _beyond(self, where: str, one: Rendered | forms.Tokens, token: int) -> RowError:
        expected = f"expected tokens from 0 to {self.vocabulary - 1}, as the target has"
        if isinstance(one, Rendered):
            name = self.encoder.tokenizer.convert_ids_to_tokens(token)
            found = f"its text has the token {name!r}, which the tokenizer numbers {token}; {expected}"
        else:
            found = f"`input_ids` holds {token}; {expected}"
        return RowError(where, "token beyond the vocabulary", found)


def vocabulary(tokenizer_dir: Path) -> int:
    """Size of the target's vocabulary by the config.json beside its tokenizer; 0 where that does not say it."""
    try:
        shape = msgspec.json.decode((tokenizer_dir / "config.json").read_bytes(), type=dict[str, Any])
        return int({**shape, **(shape.get("text_config") or {})}["vocab_size"])
    except (OSError, KeyError, TypeError, ValueError, msgspec.MsgspecError):
        return 0


def trainable(mask: NDArray[np.bool_], consecutive_labels: int) -> bool:
    """Whether `mask` has `consecutive_labels` labels in a row."""
    for _ in range(consecutive_labels - 1):
        mask = mask[1:] & mask[:-1]
    return bool(mask.any())


def pieces(size: int, most: int, least: int) -> list[tuple[int, int]]:
    """[start, end) of the pieces of a document of `size` tokens: at most `most` each, and the last at least `least`.

    Where `least` is more than `most`, all are too short.
    """
    edges = [*range(0, size, most), size]
    if len(edges) > 2 and least <= most and edges[-1] - edges[-2] < least:
        edges[-2] = size - least
    return list(pairwise(edges))
