"""Rows that predict at each step, held against their definition for any batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from drafts import make_batch
from specd.drafts.eagle3.rows import rows_of


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
