"""One batch in flight: what it asks a daemon for, and how long it rests after its transfers failed."""

from __future__ import annotations

import numpy as np
import pytest

from specd.client.pending import MOST_REST_S, REST_S
from specd.transports.base import SlotRef
from windows import item, ready


def test_a_request_carries_its_tokens_as_they_are_on_the_wire() -> None:
    pending = item(3)
    pending.seq = 7
    request = pending.request(b"e" * 16)
    assert (request.seq, request.batch_id, request.epoch) == (7, pending.identity, b"e" * 16)
    assert np.frombuffer(request.tokens, "<i4").tolist() == pending.batch.tokens.tolist()
    assert np.frombuffer(request.lengths, "<i4").tolist() == [5, 3]
    assert pending.tokens == 8
    assert str(pending) == f"batch 3 of epoch 0 (id {pending.identity.hex()})"
    pending.ready = ready(pending, 5)
    assert pending.ref == SlotRef(5, 1, pending.layout.nbytes)


def test_a_batch_rests_longer_after_each_transfer_that_failed_but_not_after_the_first() -> None:
    pending = item(0)
    rests = []
    for place in range(20):
        pending.daemon = place
        pending.miss(50.0)
        assert pending.missed_at == place
        rests.append(max(0.0, pending.rests_until - 50.0))
    assert rests[:4] == pytest.approx([0.0, REST_S, 2 * REST_S, 4 * REST_S])
    assert rests[-1] == pytest.approx(MOST_REST_S)
