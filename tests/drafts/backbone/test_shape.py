"""The shape of a block draft, from settings and target."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from drafts import (
    CONFIG,
    TARGET,
)
from specd.drafts.backbone.shape import draft_shape
from specd.errors import ConfigError


def test_shape_comes_from_the_target_unless_the_config_says_otherwise() -> None:
    shape = draft_shape(CONFIG, TARGET, (1, 3, 5))
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size) == (4, 2, 8, 48)
    assert (shape.rope_theta, shape.rms_norm_eps, shape.num_target_layers) == (5000.0, 1e-5, 8)
    assert shape.layer_types == ("full_attention",) * 2
    own = msgspec.structs.replace(CONFIG, num_heads=2, num_kv_heads=1, head_dim=64, intermediate_size=5)
    shape = draft_shape(own, {**TARGET, "rope_parameters": None, "rope_theta": 7.0, "head_dim": 128}, (1,))
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.intermediate_size) == (2, 1, 64, 5)
    assert shape.rope_theta == 7.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1}, "block_size 1 leaves nothing"),
        ({"num_kv_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"sliding_window": 2}, "sliding_window 2 is shorter than a block of 4"),
        ({"num_layers": 0}, "must be positive"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draft_shape(msgspec.structs.replace(CONFIG, **changes), TARGET, (1, 3))
