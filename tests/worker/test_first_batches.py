"""The first batches of a spec: rows that hold no numbers are named with their layer before a trainer gets them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch

from fills import make_fill
from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import embedded
from specd.errors import BatchError
from specd.memory.fp8 import Rows
from specd.protocol.capture import CaptureSpec, StateDtype
from specd.targets.base import CaptureJob, slot_rows, slot_tensors
from specd.targets.synthetic import SyntheticTarget
from specd.worker.blank import blank
from specd.worker.first_batches import FIRST, FirstBatches, problem

TAPS = (1, 4, 6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("memory", ["host", "tensor"])
def test_rows_that_are_no_numbers_are_named(dtype: StateDtype, memory: str) -> None:
    fill = make_fill((200, 7), CaptureSpec(taps=TAPS, final=True, dtype=dtype))
    states = slot_tensors(fill)
    for tensor in states.values():
        tensor.copy_(torch.randn(tensor.shape))
    looked = (
        fill if memory == "host" else msgspec.structs.replace(fill, slot=torch.frombuffer(fill.slot, dtype=torch.uint8))
    )
    states["taps"][0, 0, 0] = torch.finfo(states["taps"].dtype).max
    states["taps"][0, 0, 1] = torch.finfo(states["taps"].dtype).max
    states["final"][3] = 0
    assert problem(looked) == ""
    states["final"][206, 63] = torch.inf
    assert "after the final norm hold NaN or infinities in 1 of 207 rows" in problem(looked)
    states["taps"][150, 1, 5] = torch.nan
    states["taps"][70, 2] = -torch.inf
    states["taps"][152, 1] = torch.nan
    assert "after layer 4 hold NaN or infinities in 2 of 207 rows of a batch, first in row 150" in problem(looked)


@pytest.mark.parametrize("memory", ["host", "tensor"])
def test_rows_of_float8_are_told_by_their_scales(memory: str) -> None:
    fill = make_fill((200, 7), CaptureSpec(taps=TAPS, final=True, dtype="float8_e4m3fn"))
    slot = fill.slot if memory == "host" else torch.frombuffer(fill.slot, dtype=torch.uint8)
    looked, rows = msgspec.structs.replace(fill, slot=slot), slot_rows(fill)
    states = torch.randn(207, 64)
    for out in (*rows.taps, rows.final):
        assert isinstance(out, Rows)
        out.copy_(states)
    assert problem(looked) == ""
    states[150, 5], states[152, 0] = torch.nan, -torch.inf
    rows.taps[1].copy_(states)
    assert "after layer 4 hold NaN or infinities in 2 of 207 rows of a batch, first in row 150" in problem(looked)
    blank(slot, fill.layout)
    assert "after layer 1 hold NaN or infinities in 207 of 207 rows" in problem(looked), "no target wrote scales"


def test_each_spec_has_first_batches() -> None:
    first = FirstBatches()
    specs = [CaptureSpec(taps=taps) for taps in ((1,), (2,))]
    assert [first.has(specs[0]) for _ in range(FIRST + 2)] == [True] * FIRST + [False] * 2
    assert first.has(specs[1])


def test_a_trainer_never_gets_them_and_others_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = SyntheticTarget.run

    def run(self: Any, fills: Sequence[CaptureJob]) -> Any:
        sound(self, fills)
        for fill in fills:
            if fill.tokens.tobytes() == batch(1).tokens.tobytes():
                slot_tensors(fill)["taps"][2, 1, 0] = torch.nan

    monkeypatch.setattr(SyntheticTarget, "run", run)
    settings = DaemonConfig(
        target=TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128"), ring=RingConfig(slots=4, slot_tokens=64)
    )
    spec = CaptureSpec(taps=(1, 3), dtype="float32")
    with embedded(settings) as host:
        config = SubscriberConfig(endpoints=(host.endpoint,), timeout_s=20, connect_s=20)
        with Subscriber(config, spec, context=host.context) as source:
            assert next(iter(source.stream([batch(0)]))).batch.index == 0
        with (
            Subscriber(config, spec, context=host.context) as source,
            pytest.raises(BatchError, match=r"after layer 3 hold NaN or infinities in 1 of .* first in row 2"),
        ):
            list(source.stream([batch(1)]))
        with Subscriber(config, spec, context=host.context) as source:
            assert [delivery.batch.index for delivery in source.stream([batch(2), batch(3)])] == [2, 3]
