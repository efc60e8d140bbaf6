"""`specd bench draft`: the operations it counts are those torch executes, and its figures fit together."""

from __future__ import annotations

import io

import msgspec
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from specd.bench.draft import TINY, Variant, _objective, render, run, useful_flops
from specd.config.settings import DFlashConfig
from specd.drafts.blocks import make_blocks, sample_anchors
from specd.errors import ConfigError
from specd.protocol.batch import Batch, Delivery

CONFIG = DFlashConfig(num_layers=2, num_taps=2, block_size=4, num_anchors=6, loss_chunk=5)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("window", [0, 12])
def test_counted_operations_are_those_that_torch_executes(window: int) -> None:
    """All products of the step but attention's, which the plain path computes for hidden scores too."""
    config = msgspec.structs.replace(CONFIG, sliding_window=window)
    objective = _objective(TINY, Variant(config), torch.device("cpu"), torch.float32)
    shape = objective.draft.shape
    batch = Batch(
        tokens=np.arange(50, dtype=np.int32),
        lengths=np.array([50], np.int32),
        loss_mask=np.ones(50, np.bool_),
        samples=(0,),
    )
    with FlopCounterMode(display=False) as counter:
        objective.loss(Delivery(batch, torch.randn(50, 2, shape.hidden_size))).sum.backward()  # type: ignore[no-untyped-call]
    executed = counter.get_flop_counts()["Global"]
    anchors = sample_anchors(batch.loss_mask, batch.lengths, batch.samples, 0, 0, config.num_anchors)
    counted = useful_flops(shape, 50, make_blocks(batch, anchors, 4, 511, objective.decay))
    attention = counted.pop("attention")
    assert executed[torch.ops.aten.mm] == sum(counted.values())
    assert 0 < attention <= executed[torch.ops.aten.bmm]
    seen = sum(min(int(p), max(0, window - 1 - k) if window else int(p)) + 4 for p in anchors[0] for k in range(4))
    assert attention == 3 * 2 * 2 * 2 * seen * 64


def test_rows_of_a_tiny_draft_fit_together() -> None:
    result = run(steps=3, context=[24, 70], device="cpu", variants={"one": Variant(CONFIG), "two": Variant(CONFIG)})
    assert [(row.variant, row.context_tokens) for row in result.rows] == [
        ("one", 24), ("one", 70), ("two", 24), ("two", 70),
    ]  # fmt: skip
    for row in result.rows:
        assert row.p25_ms <= row.step_ms <= row.p75_ms
        assert row.mfu == pytest.approx(row.tflop_per_s / row.ceiling_tflop_per_s, rel=0.05)
        assert row.tflop_per_s == pytest.approx(sum(row.useful_tflop.values()) / row.step_ms * 1e3, rel=1e-3)
        assert set(row.phases_ms) == {"inputs", "forward", "head", "backward", "optimizer"}
        assert sum(row.phases_ms.values()) == pytest.approx(row.step_ms, rel=0.5)
        assert row.block_tokens == row.blocks * CONFIG.block_size > row.predictions > 0
    assert msgspec.json.decode(msgspec.json.encode(result))["rows"][0]["attention_ms"] > 0


def test_the_table_names_every_row_and_the_ceiling() -> None:
    from rich.console import Console

    result = run(steps=1, context=[30], device="cpu", variants={"one": Variant(CONFIG)})
    out = io.StringIO()
    Console(file=out, width=160).print(render(result))
    text = out.getvalue()
    assert "one" in text
    assert "backward" in text
    assert "256³ float32 matmul" in text


def test_a_context_without_a_prediction_is_refused() -> None:
    with pytest.raises(ConfigError, match="context of 1 tokens: expected at least 2"):
        run(context=[1], device="cpu")
