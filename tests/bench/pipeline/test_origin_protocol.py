"""`origin`, emulated: its bytes, its states, and a serving process that does not serve."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import torch

from specd.bench.pipeline import bare_target
from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.origin_protocol import TRAINER, OriginClient, payload_bytes, serving
from specd.bench.pipeline.process_group import joined, shake_hands
from specd.bench.pipeline.settings import batches
from specd.config.settings import TargetConfig
from specd.errors import DaemonError
from specd.memory.states import views
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.registry import load_target

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})


def test_a_token_takes_the_bytes_that_its_pull_request_states() -> None:
    assert payload_bytes(CaptureSpec(taps=(1, 12, 23, 34, 45)), 2048) == 20_504
    assert payload_bytes(CaptureSpec(taps=(1, 12), final=True), 2048) == 3 * 4096 + 24


@pytest.mark.parametrize(
    "spec", [CaptureSpec(taps=(1, 4), dtype="float32"), CaptureSpec(taps=(), final=True, dtype="float32")]
)
def test_the_emulation_delivers_the_targets_states(spec: CaptureSpec, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, steps=4, warmup=1, depths=(0,))
    target = load_target(TargetConfig(model=TINY))
    with serving(settings, spec, tmp_path) as (job, first):
        assert first.bare is not None
        assert all(rate > 0 for rate in first.bare.short_tokens_per_s.values())
        with joined("gloo", job.store, TRAINER, 2) as group:
            shake_hands(group, TRAINER, "cpu")
            with closing(OriginClient(first.port, group, "gloo", spec, target.contract, "cpu")) as client:
                for overlap in (False, True):
                    found = list(client.stream(batches(settings, "log-normal", 64, 5, 3 + overlap), overlap))
                    assert [one.batch.index for one in found] == [0, 1, 2, 3, 4]
                    for one in found:
                        layout = slot_layout(spec, 32, one.batch.num_tokens)
                        slot = bare_target.slot(layout.nbytes, "cpu")
                        target.run([bare_target.fill(one.batch, spec, 32, slot)])
                        expected = views(torch.frombuffer(slot, dtype=torch.uint8), layout)
                        delivered = {"taps": one.taps, "final": one.final}
                        assert {name for name, part in delivered.items() if part is not None} == {*expected}
                        for name, part in expected.items():
                            assert torch.equal(delivered[name], part.to(torch.bfloat16))  # type: ignore[arg-type]


def test_a_target_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, model="synthetic:hidden=0")
    with (
        pytest.raises(DaemonError, match="expected hidden ≥ 1"),
        serving(settings, CaptureSpec(taps=(1,)), tmp_path),
    ):
        pass
