"""The pipeline benchmark's settings and batches: what is drawn, and what shares a forward."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.settings import Settings, SleepConfig, batches
from specd.errors import ConfigError

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})


def test_batches_never_repeat_tokens_but_keep_their_lengths() -> None:
    one, other = (batches(SETTINGS, "log-normal", 64, 12, nonce) for nonce in (1, 2))
    assert [batch.lengths.tolist() for batch in one] == [batch.lengths.tolist() for batch in other]
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))
    assert len({batch.tokens.tobytes() for batch in one}) == 12
    assert all(batch.num_tokens <= SETTINGS.batch_tokens for batch in one)
    assert len({length for batch in one for length in batch.lengths.tolist()}) > 4
    shifted = batches(SETTINGS, "log-normal", 64, 12, 1, shift=1)
    assert shifted[0].lengths.tolist() == one[1].lengths.tolist()


def test_what_can_share_a_forward_is_what_waits_and_fits() -> None:
    settings = Settings(model=TINY, batch_tokens=3072, forward_tokens=8192)
    assert [settings.merged(depth, "fixed") for depth in (0, 1, 2, 4)] == [1, 1, 2, 2]
    # Log-normal batches seldom fill their budget: three of them may fit where two full ones do.
    assert [settings.merged(depth, "log-normal") for depth in (0, 1, 2, 4)] == [1, 1, 2, 3]
    exact = msgspec.structs.replace(settings, target={"exact": True})
    assert [exact.merged(4, lengths) for lengths in ("fixed", "log-normal")] == [1, 1]
    assert settings.forwards([9000, 4000, 4000, 500, 500], 2) == [slice(0, 1), slice(1, 3), slice(3, 5)]


def test_a_draft_that_sleeps_has_options() -> None:
    draft = msgspec.structs.replace(SETTINGS, draft="synthetic:ms=1.5,params=64")
    assert draft.sleep == SleepConfig(ms=1.5, params=64)
    assert SETTINGS.sleep is None


def test_unknown_draft_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_anchor"):
        _ = msgspec.structs.replace(SETTINGS, draft_config={"num_anchor": 3}).draft_settings
