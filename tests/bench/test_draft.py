"""`specd bench draft`: the operations it counts are those torch executes, and its figures fit together."""

from __future__ import annotations

import io
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from specd.bench import draft
from specd.bench.draft import TINY, DraftResult, Variant, render, run
from specd.errors import ConfigError
from specd.protocol.batch import Batch, Delivery

SETTINGS = {"num_layers": 2, "num_taps": 2, "block_size": 4, "num_anchors": 6, "loss_chunk": 5}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("window", [0, 12])
def test_counted_operations_are_those_that_torch_executes(window: int) -> None:
    """All products of the step but attention's, which the plain path computes for hidden scores too."""
    way = Variant(SETTINGS | {"sliding_window": window})
    trained = draft._Trained.made("dflash", TINY, way, torch.device("cpu"), torch.float32)
    batch = Batch(
        tokens=np.arange(50, dtype=np.int32),
        lengths=np.array([50], np.int32),
        loss_mask=np.ones(50, np.bool_),
        samples=(0,),
    )
    with FlopCounterMode(display=False) as counter:
        trained.objective.loss(Delivery(batch, *trained.states(50))).sum.backward()  # type: ignore[no-untyped-call]
    executed = counter.get_flop_counts()["Global"]
    counted = dict(trained.method.workload(trained.objective, batch).flops)
    attention = counted.pop("attention")
    assert executed[torch.ops.aten.mm] == sum(counted.values())
    assert 0 < attention <= executed[torch.ops.aten.bmm]
    objective: Any = trained.objective
    anchors = objective.draw(batch).layout.anchors
    seen = sum(
        min(int(p), max(0, window - 1 - k) if window else int(p)) + (k + 1 if window else 4)
        for p in anchors
        for k in range(4)
    )
    assert attention == 3 * 2 * 2 * 2 * seen * 64


def test_operations_of_dflash2_are_those_that_torch_executes() -> None:
    """All products but attention's; of the selector's batched ones there are others only where attention is plain."""
    trained = draft._Trained.made("dflash2", TINY, Variant(SETTINGS), torch.device("cpu"), torch.float32)
    batch = Batch(
        tokens=np.arange(50, dtype=np.int32),
        lengths=np.array([50], np.int32),
        loss_mask=np.ones(50, np.bool_),
        samples=(0,),
    )
    with FlopCounterMode(display=False) as counter:
        trained.objective.loss(Delivery(batch, *trained.states(50))).sum.backward()  # type: ignore[no-untyped-call]
    executed, counted = counter.get_flop_counts()["Global"], trained.method.workload(trained.objective, batch).flops
    batched = counted.pop("selector") + counted.pop("attention")
    assert executed[torch.ops.aten.mm] == sum(counted.values())
    assert 0 < batched <= executed[torch.ops.aten.bmm]


def test_operations_of_dspark_are_those_that_torch_executes() -> None:
    """All products but attention's; where a chunk ends between rows of a teacher, that is computed twice."""
    way = Variant(SETTINGS | {"markov_rank": 8, "loss_chunk": 512})
    trained = draft._Trained.made("dspark", TINY, way, torch.device("cpu"), torch.float32)
    batch = Batch(
        tokens=np.arange(50, dtype=np.int32),
        lengths=np.array([50], np.int32),
        loss_mask=np.ones(50, np.bool_),
        samples=(0,),
    )
    with FlopCounterMode(display=False) as counter:
        trained.objective.loss(Delivery(batch, *trained.states(50))).sum.backward()  # type: ignore[no-untyped-call]
    executed, counted = counter.get_flop_counts()["Global"], trained.method.workload(trained.objective, batch).flops
    assert counted.pop("attention") > 0
    assert executed[torch.ops.aten.mm] + executed[torch.ops.aten.addmm] == sum(counted.values())


@pytest.fixture(scope="module")
def result() -> DraftResult:
    # Of fifteen steps: with a few, one that the machine held up moves the medians of stretches and whole apart.
    return run(steps=15, context=[24, 70], device="cpu", variants={"one": Variant(SETTINGS), "two": Variant(SETTINGS)})


def test_rows_of_a_tiny_draft_fit_together(result: DraftResult) -> None:
    assert [(row.variant, row.context_tokens) for row in result.rows] == [
        ("one", 24), ("one", 70), ("two", 24), ("two", 70),
    ]  # fmt: skip
    for row in result.rows:
        assert row.p25_ms <= row.step_ms <= row.p75_ms
        assert row.mfu == pytest.approx(row.tflop_per_s / row.ceiling_tflop_per_s, rel=0.05)
        assert row.tflop_per_s == pytest.approx(sum(row.useful_tflop.values()) / row.step_ms * 1e3, rel=1e-3)
        assert set(row.phases_ms) == {"inputs", "forward", "head", "backward", "optimizer"}
        assert sum(row.phases_ms.values()) == pytest.approx(row.step_ms, rel=0.5)
        assert row.rows == 6 * 4 > row.predictions > 0
        assert row.parts_ms["attention"] > 0
    assert msgspec.json.decode(msgspec.json.encode(result), type=DraftResult).rows == result.rows
    assert result.draft["mask_token_id"] == TINY["vocab_size"] - 1


def test_operations_of_eagle_are_those_that_torch_executes() -> None:
    """All of its products but attention's; the teacher's rows and the prediction's are not in chunks of one size."""
    trained = draft._Trained.made("eagle3", TINY, Variant({"num_steps": 3}), torch.device("cpu"), torch.float32)
    batch = Batch(
        tokens=np.arange(50, dtype=np.int32),
        lengths=np.array([30, 20], np.int32),
        loss_mask=np.arange(50) % 30 > 10,
        samples=(0, 1),
    )
    with FlopCounterMode(display=False) as counter:
        trained.objective.loss(Delivery(batch, *trained.states(50))).sum.backward()  # type: ignore[no-untyped-call]
    counted = dict(trained.method.workload(trained.objective, batch).flops)
    attention = counted.pop("attention")
    executed = counter.get_flop_counts()["Global"]
    assert executed[torch.ops.aten.mm] == sum(counted.values())
    assert attention > 0


def test_a_draft_whose_module_is_never_called_has_one_stretch_for_its_loss() -> None:
    result = run(steps=2, context=[24, 70], device="cpu", name="eagle3")
    for row in result.rows:
        assert set(row.phases_ms) == {"loss", "backward", "optimizer"}
        assert row.rows >= row.predictions > 0
    assert render(result) is not None


def test_the_table_names_every_row_and_the_ceiling(result: DraftResult) -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(render(result))
    for words in ("DFlash", "one", "two", "backward", "attention alone", "256³ float32 matmul"):
        assert words in out.getvalue(), words


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"context": [1]}, "context of 1 tokens: expected at least 2"),
        ({"name": "pigeon"}, "unknown draft method 'pigeon'"),
        ({"variants": {"one": Variant({"num_anchor": 3})}}, "num_anchor"),
    ],
)
def test_what_cannot_be_is_refused(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(device="cpu", **asked)
