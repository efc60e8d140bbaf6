"""The draft vocabulary holds the most frequent labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specd.drafts.vocabulary import covered, draft_vocabulary
from specd.errors import ConfigError


def test_ties_go_to_the_smaller_id_and_unused_ids_fill_up() -> None:
    counts = np.array([0, 4, 0, 9, 4, 4, 0])
    assert draft_vocabulary(counts, 3).tolist() == [1, 3, 4]
    assert draft_vocabulary(counts, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert covered(counts, draft_vocabulary(counts, 3)) == 17 / 21
    assert covered(np.zeros(3, np.int64), np.array([1])) == 1.0


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=40), data=st.data())
def test_no_token_outside_is_more_frequent_than_one_inside(counts: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(counts)))
    frequencies = np.array(counts)
    try:
        chosen = draft_vocabulary(frequencies, size)
    except ConfigError:
        assert 2 * sum(sorted(counts)[-size:]) < sum(counts)
        return
    assert chosen.size == size
    assert (np.diff(chosen) > 0).all()
    assert min(frequencies[chosen]) >= max(np.delete(frequencies, chosen), default=0)


def test_what_covers_too_little_is_refused() -> None:
    with pytest.raises(ConfigError, match="covers 40% of the labels: expected at least 50%"):
        draft_vocabulary(np.full(5, 2), 2)
    with pytest.raises(ConfigError, match="expected at most the target's 5 tokens, or 0"):
        draft_vocabulary(np.full(5, 2), 6)
