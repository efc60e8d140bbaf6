"""Rows that predict at each step, held against their definition for any batch."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drafts import make_batch
from specd.drafts.eagle3.rows import in_tiles, rows_of


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.1]),
    seed=st.integers(0, 5),
    steps=st.integers(1, 7),
)
def test_rows_are_those_of_the_definition(lengths: list[int], density: float, seed: int, steps: int) -> None:
    batch = make_batch(tuple(lengths), density, seed)
    rows = rows_of(batch, steps)
    mask, ends = batch.loss_mask, list[int]()
    for length in lengths:
        ends += [len(ends) + length] * length
    predicting = [
        [t for t in range(len(ends)) if t + 2 + j < ends[t] and mask[t + 1 + j] and mask[t + 2 + j]]
        for j in range(steps)
    ]
    for step in range(steps):
        wide = rows.queries[step]
        assert wide.tolist() == sorted(set().union(*predicting[step:]))
        assert wide[rows.counting[step]].tolist() == predicting[step]
        assert rows.teachers[rows.taught[step]].tolist() == [t + 1 + step for t in predicting[step]]
    assert all(set(later) <= set(sooner) for sooner, later in zip(rows.queries, rows.queries[1:], strict=False))
    begins = [sum(lengths[:number]) for number, length in enumerate(lengths) for _ in range(length)]
    assert rows.starts.tolist() == begins


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.1]),
    steps=st.integers(1, 7),
)
def test_rows_in_whole_tiles_predict_the_same(lengths: list[int], density: float, steps: int) -> None:
    rows = rows_of(make_batch(tuple(lengths), density), steps)
    filled = in_tiles(rows)
    asked, tokens = rows.queries[0].size, rows.starts.size
    assert all(queries is filled.queries[0] for queries in filled.queries)
    assert filled.queries[0].size % 128 == filled.starts.size % 128 == 0
    assert asked <= filled.queries[0].size < asked + 257
    assert (np.diff(filled.queries[0]) >= 0).all()
    assert filled.queries[0].max() < tokens
    assert filled.starts[:tokens].tolist() == rows.starts.tolist()
    assert filled.starts[tokens:].tolist() == [*range(tokens, filled.starts.size)]
    for step in range(steps):
        predicting = rows.queries[step][rows.counting[step]]
        assert filled.queries[step][filled.counting[step]].tolist() == predicting.tolist()
        assert (filled.counting[step] < asked).all()
    assert filled.taught is rows.taught
