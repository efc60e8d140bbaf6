"""Which rows of a packed batch predict at each step of training-time test.

At step j row t of a sequence reads token t + 1 + j and predicts token t + 2 + j, taught by the target's final state of
token t + 1 + j. It counts where both tokens are labels of the sequence: then decoding meets that guess.
Shape legend: T tokens of a batch, U teacher rows, P predictions of all steps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specd.drafts.device import Ints
from specd.drafts.flex import in_whole_tiles
from specd.protocol.batch import Batch


class Rows(NamedTuple):
    """Rows of one batch, all ascending.

    starts: first token of the sequence of each token, [T]. teachers: tokens whose final state teaches, [U].
    queries: for each step the rows that predict at it or a later one; each holds the next. counting: for each step, the
    places in `queries` of those that predict at it. taught: for each step, the places in `teachers` of their teachers.
    """

    starts: Ints
    teachers: Ints
    queries: tuple[Ints, ...]
    counting: tuple[Ints, ...]
    taught: tuple[Ints, ...]


def rows_of(batch: Batch, num_steps: int) -> Rows:
    """The rows of `batch`."""
    lengths = batch.lengths.astype(np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    labels = batch.loss_mask
    last = np.zeros(batch.num_tokens, np.bool_)
    last[np.cumsum(lengths) - 1] = True
    chained = labels[:-1] & labels[1:] & ~last[:-1]  # a label with another one behind it
    teachers = np.flatnonzero(chained)
    place = np.cumsum(np.append(chained, False)) - 1
    first = teachers - starts[teachers]
    predicting = [(teachers - 1 - step)[first >= 1 + step] for step in range(num_steps)]
    queries: list[Ints] = []
    for rows in reversed(predicting):
        queries.append(np.union1d(queries[-1], rows) if queries else rows)
    queries.reverse()
    return Rows(
        starts,
        teachers,
        tuple(queries),
        tuple(np.searchsorted(wide, rows) for wide, rows in zip(queries, predicting, strict=True)),
        tuple(place[rows + 1 + step] for step, rows in enumerate(predicting)),
    )


def in_tiles(rows: Rows) -> Rows:
    """The same predictions, made from one set of rows at all steps, and tokens and rows filled up to whole tiles.

    A few rows run on for steps at which they predict nothing. In return one mask serves every step, nothing is gathered
    between them, and kernels meet one size a batch. Tokens that fill up are sequences of their own, rows that fill up
    repeat the last one; neither counts.
    """
    asked, tokens = rows.queries[0], rows.starts.size
    missing = in_whole_tiles(asked.size) - asked.size
    filled = np.pad(asked, (0, missing), mode="edge") if asked.size else np.zeros(missing, np.int64)
    return rows._replace(
        starts=np.append(rows.starts, np.arange(tokens, in_whole_tiles(tokens))),
        queries=(filled,) * len(rows.queries),
        counting=tuple(
            np.searchsorted(asked, of[places]) for of, places in zip(rows.queries, rows.counting, strict=True)
        ),
    )
