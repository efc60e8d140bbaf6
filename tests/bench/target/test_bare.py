"""A bare target that answers asks, one line each."""

from __future__ import annotations

from typing import Any

import msgspec

from specd.bench.target.bare import BareAnswer, BareAsk, groups, serve
from specd.bench.target.run import Plan, settings_for

TINY = "synthetic:hidden=32,layers=8,vocab=64,ms=3"
SETTINGS = settings_for(TINY, Plan(sizes=(16,)), {"max_forward_tokens": 64})


def test_forwards_hold_as_many_samples_as_asked_and_never_the_same_tokens() -> None:
    found = groups(SETTINGS, BareAsk(tokens=16, share=4, forwards=3, nonce=1), 64, 5)
    assert [[batch.num_tokens for batch in group] for group in found] == [[16] * 4] * 5
    assert len({batch.tokens.tobytes() for group in found for batch in group}) == 20
    other = groups(SETTINGS, BareAsk(tokens=16, share=4, forwards=3, nonce=2), 64, 1)
    assert other[0][0].tokens.tobytes() != found[0][0].tokens.tobytes()


def test_every_ask_is_answered_and_a_bad_one_with_its_reason() -> None:
    said: list[Any] = []
    asks = [
        BareAsk(tokens=16, share=1, forwards=4, warmup=1),
        BareAsk(tokens=0, share=1, forwards=1),
        BareAsk(tokens=64, share=1, forwards=2, profiled=True),
    ]
    serve(SETTINGS, map(msgspec.json.encode, asks), said.append)
    loaded, timed, refused, profiled = said
    assert isinstance(loaded, BareAnswer)
    assert (loaded.target["vocab"], len(loaded.target["taps"])) == (64, 3)
    assert len(timed.seconds) == 4
    assert sum(timed.seconds) >= 0.012
    assert (refused.seconds, bool(refused.error)) == ((), True)
    assert len(profiled.seconds) == 2
