"""A target and the settings of a draft that train in a second, for tests of the command line."""

from __future__ import annotations

TARGET = "synthetic:hidden=32,layers=8,vocab=256"
TINY = {
    "draft.num_layers": 1, "draft.num_taps": 2, "draft.block_size": 4, "draft.num_anchors": 4,
    "draft.mask_token_id": 255, "data.batch_tokens": 80, "data.max_length": 40, "train.epochs": 1,
    "subscriber.connect_s": 5,
}  # fmt: skip
