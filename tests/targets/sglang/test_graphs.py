"""Prefill graphs over a fake SGLang: replays give the states of no graph, padding stays out, and what refuses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import fake_sglang
from fake_sglang import LAYERS, Layer, ModelRunner
from fake_sglang_graphs import PrefillCudaGraphRunner
from fake_sglang_stream import Gated
from fills import make_fill, read
from specd.config.settings import TargetConfig
from specd.errors import ConfigError, TargetError
from specd.memory.fp8 import encode
from specd.protocol.capture import FP8, CaptureSpec
from specd.targets.registry import load_target
from specd.targets.sglang.graphs import BUCKETS, PrefillGraphs, buckets, compare
from specd.targets.sglang.setup import RankSetup
from specd.targets.sglang.target import SGLangTarget
from specd.targets.sglang.versions import SGLang

SPEC = CaptureSpec(taps=(0, 2, LAYERS - 2), final=True, dtype="float32")
TAPS_ONLY = CaptureSpec(taps=(1,), dtype="float32")


@pytest.fixture(params=["0.5.17", "0.5.23"])
def config(request: pytest.FixtureRequest, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> TargetConfig:
    fake_sglang.install(monkeypatch, request.param)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    return TargetConfig(
        model=f"{checkpoint}/", backend="sglang", device="cpu", max_forward_tokens=300, prefill_graphs=(128, 256)
    )


@pytest.fixture
def target(config: TargetConfig) -> Iterator[SGLangTarget]:
    made = load_target(config)
    assert isinstance(made, SGLangTarget)
    yield made
    made.close()


def parts(target: SGLangTarget) -> tuple[Any, Any, list[Any]]:
    """Its graphs, SGLang's, and its layers."""
    assert target._engine is not None
    assert target._engine._graphs is not None
    return target._engine._graphs, target._engine.runner.prefill_cuda_graph_runner, list(target._engine.layers)


CASES = (
    ((64,), 128), ((60, 1, 49), 128), ((64, 64), 128), ((63, 64, 64, 10), 256), ((63,), None), ((64,) * 4 + (1,), None),
)  # fmt: skip
"""Lengths of a batch, and the graph that it is replayed with: none for one padded to more than twice, or too long."""


def test_a_replay_gives_the_states_of_no_graph(target: SGLangTarget) -> None:
    graphs, theirs, layers = parts(target)
    for spec in (SPEC, TAPS_ONLY):
        for lengths, bucket in CASES:
            eager, replayed = make_fill(lengths, spec), make_fill(lengths, spec)
            with graphs.off():
                target.run([eager])
            ran, before = list(theirs.replayed), [layer.calls for layer in layers]
            target.run([replayed])
            assert theirs.replayed == ran + ([] if bucket is None else [bucket])
            assert ([layer.calls for layer in layers] == before) is (bucket is not None)
            assert not any(layer._forward_hooks for layer in layers)
            torch.testing.assert_close(read(replayed), read(eager))


def test_padding_never_reaches_a_slot(target: SGLangTarget) -> None:
    graphs, theirs, _ = parts(target)
    merged = [make_fill((40, 9), SPEC), make_fill((64,), SPEC, seed=3), make_fill((1, 1), SPEC, seed=4)]
    target.run(merged)
    assert theirs.replayed[-1] == 128
    _, (hidden, _) = theirs.graphs[128]
    assert hidden[115:].isnan().all()  # what the fake leaves behind the batch
    for fill in merged:
        alone = msgspec.structs.replace(fill, slot=memoryview(bytearray(b"\xa5" * len(fill.slot))))
        with graphs.off():
            target.run([alone])
        torch.testing.assert_close(read(fill), read(alone))


def test_replays_follow_one_another(target: SGLangTarget) -> None:
    """Nothing of a larger batch is left in the memory of a smaller one."""
    first, other, again = make_fill((64, 63), SPEC), make_fill((64, 40), SPEC, seed=5), make_fill((64, 63), SPEC)
    for fill in (first, other, again):
        target.run([fill])
    assert all(torch.equal(read(first)[name], read(again)[name]) for name in ("taps", "final"))
    assert not torch.equal(read(first)["final"][:64], read(other)["final"][:64])


@pytest.mark.parametrize("config", ["0.5.17"], indirect=True)
def test_replays_that_are_wrong_are_refused_at_the_start(config: TargetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Incomplete(PrefillCudaGraphRunner):
        """Its graphs lack an operation of each layer."""

        def execute(self, batch: Any) -> Any:
            graph, _ = self.graphs[128]
            graph.steps = [step for step in graph.steps if step[0].__name__ != "tanh.default"]
            return super().execute(batch)

    monkeypatch.setattr(fake_sglang, "PrefillCudaGraphRunner", Incomplete)
    with pytest.raises(
        TargetError, match=r"graphs of Model give other states after layer 0 .* turn target.prefill_graphs off"
    ):
        load_target(config)


@pytest.mark.parametrize("config", ["0.5.17"], indirect=True)
def test_a_model_that_sglang_records_no_graphs_of_is_refused(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "suits", False)
    with pytest.raises(
        TargetError, match=r"records no prefill graphs of its Model on cpu.* turn target.prefill_graphs off"
    ):
        load_target(config)


@pytest.mark.parametrize("config", ["0.5.23"], indirect=True)
def test_residuals_that_are_no_addition_are_refused(config: TargetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "update", Gated())
    with pytest.raises(
        TargetError, match=r"cannot record prefill graphs of its Model: .* by Gated, expected an addition"
    ):
        load_target(config)


@pytest.mark.parametrize("config", ["0.5.14"], indirect=True)
def test_an_sglang_without_such_graphs_is_refused(config: TargetConfig) -> None:
    with pytest.raises(ConfigError, match=r"sglang 0\.5\.14 is installed, expected 0\.5\.17 or newer"):
        load_target(config)


def test_buckets_fit_a_forward() -> None:
    sglang = SGLang(version=(0, 5, 17), symbols={})
    assert buckets(False, 8192, sglang) == ()
    assert buckets(True, 8192, sglang) == BUCKETS
    assert buckets(True, 1000, sglang) == (256, 384, 512, 640, 768, 1000)
    assert buckets((512, 128, 512), 1000, sglang) == (128, 512)
    for asked in ((64,), (512, 1001)):
        with pytest.raises(ConfigError, match=f"a graph of {asked[-1]} tokens, expected 128 to"):
            buckets(asked, 1000, sglang)
    with pytest.raises(ConfigError, match="expected at least 128"):
        buckets(True, 100, sglang)


def test_a_layer_is_told_from_its_neighbours_and_its_rounding_forgiven() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(6, 9, 32, generator=generator)
    eager = torch.cat([torch.cumsum(steps[:5], 0), steps[5:]])
    noise = 0.02 * torch.randn(eager.shape, generator=generator)
    compare(eager + noise * eager.norm(dim=2, keepdim=True) / 32**0.5, eager, "a model")
    shifted, dead, broken = eager.clone(), eager.clone(), eager.clone()
    shifted[2] = eager[3]
    dead[5] = 0
    broken[4, 3, 0] = torch.nan
    for states, place in ((shifted, "layer 2"), (dead, "the final norm"), (broken, "layer 4")):
        with pytest.raises(TargetError, match=f"after {place} than"):
            compare(states, eager, "a model")


def test_other_ranks_keep_no_states() -> None:
    given: dict[str, Any] = {
        "path": "",
        "load_format": "auto",
        "dtype": "float32",
        "device": "cpu",
        "gpu": 0,
        "port": 0,
    }
    given |= {"memory_fraction": 0.9, "attention_backend": "", "max_tokens": 300, "context": 64}
    layers = [torch.nn.Linear(1, 1)] * 2
    second = PrefillGraphs(None, layers, RankSetup(tp=2, rank=1, prefill_graphs=(128,), **given))
    second.use((0, 1))
    assert [states.numel() for states in second.states((), {})] == [0, 0]
    with second.recorded():
        layers[0](torch.zeros(3, 1))
        with pytest.raises(TargetError, match="return neither"):
            layers[0](torch.zeros(1))
    layers[0](torch.zeros(1))


@pytest.mark.parametrize("lengths", [(60, 64), (64, 60, 64, 64, 40)])
def test_float8_states_are_the_same_encoded_whether_replayed_or_not(
    target: SGLangTarget, lengths: tuple[int, ...]
) -> None:
    """In a graph they are copied out, else added up in a hook."""
    _, theirs, _ = parts(target)
    native, scaled = (
        make_fill(lengths, msgspec.structs.replace(SPEC, dtype=dtype)) for dtype in (target.contract.dtype, FP8)
    )
    before = len(theirs.replayed)
    target.run([native])
    target.run([scaled])
    assert len(theirs.replayed) - before == (2 if sum(lengths) <= 256 else 0)
    found, states = read(scaled), read(native)
    for rows_TNH, name in ((states["taps"], "taps"), (states["final"][:, None], "final")):
        for k, rows_TH in enumerate(rows_TNH.unbind(1)):
            codes, scales = torch.empty(rows_TH.shape, dtype=torch.float8_e4m3fn), torch.empty(len(rows_TH))
            encode(rows_TH, codes, scales)
            assert torch.equal(found[f"{name}_scale"].view(-1, len(rows_TH))[k], scales)
            assert torch.equal(found[name].view(rows_TNH.shape)[:, k].float(), codes.float())
