"""What became of some rows: their samples, end to end, and the counts that add up over a file."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.data.faults import Fault, Faults


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of prepared data: rows = samples − split + without_labels + the rows of `bad`.

    rows: read. samples, tokens, trainable_tokens: in the data set; a trainable token is one under the loss mask.
    cut: samples longer than max_length. split: further samples of long documents, beyond each one's first.
    without_labels: rows left out, with fewer consecutive labels than the draft needs. bad: rows that cannot be used.
    dropped: answers of which the chat template leaves out a part. forms: samples by their `form` column, where they
    have one. sources: samples of each source. illustrated: samples with images.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trainable_tokens: int = 0
    cut: int = 0
    split: int = 0
    without_labels: int = 0
    bad: tuple[Fault, ...] = ()
    dropped: int = 0
    forms: dict[str, int] = {}
    sources: tuple[int, ...] = ()
    illustrated: int = 0

    def plus(self, later: Report, source: int) -> Report:
        """This report and that of the rows behind it, which are those of source number `source`."""
        faults = Faults()
        faults.merge(self.bad)
        faults.merge(later.bad)
        samples = [*self.sources, *[0] * (source + 1 - len(self.sources))]
        samples[source] += later.samples
        return Report(
            **{name: getattr(self, name) + getattr(later, name) for name in _COUNTS},
            bad=faults.found(),
            forms={name: self.forms.get(name, 0) + later.forms.get(name, 0) for name in self.forms | later.forms},
            sources=tuple(samples),
        )

    @property
    def num_bad(self) -> int:
        """How many rows cannot be used."""
        return sum(fault.rows for fault in self.bad)


_COUNTS = ("rows", "samples", "tokens", "trainable_tokens", "cut", "split", "without_labels", "dropped", "illustrated")


class Portion(NamedTuple):
    """Samples of some rows, end to end. tokens int32 [N], loss_mask bool [N].

    lengths: tokens of each sample [S]. rows: which row each one is of [S], ascending, from 0. pictures: what is kept of
    each one's images [S], or () if none has any.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    rows: NDArray[np.int64]
    report: Report
    pictures: tuple[bytes, ...] = ()

    @staticmethod
    def of(
        samples: list[tuple[int, NDArray[np.int32], NDArray[np.bool_]]], pictures: tuple[bytes, ...] = (), **counts: Any
    ) -> Portion:
        """samples: (row, tokens, loss mask) of each. pictures: of each, empty for none. counts: of its Report."""
        tokens = np.concatenate([np.empty(0, np.int32), *(tokens for _, tokens, _ in samples)])
        loss_mask = np.concatenate([np.empty(0, np.bool_), *(mask for *_, mask in samples)])
        report = Report(
            samples=len(samples), tokens=tokens.size, trainable_tokens=int(np.count_nonzero(loss_mask)),
            illustrated=sum(map(bool, pictures)), **counts,
        )  # fmt: skip
        lengths = np.array([tokens.size for _, tokens, _ in samples], np.int64)
        return Portion(tokens, loss_mask, lengths, np.array([row for row, *_ in samples], np.int64), report,
                       pictures if any(pictures) else ())  # fmt: skip
