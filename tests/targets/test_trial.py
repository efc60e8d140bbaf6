"""The trial at the start: a planted fault is refused with its layer's number, in every backend; sound targets serve."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fake_sglang
from chats import write_target
from specd.config.settings import TargetConfig
from specd.errors import TargetError
from specd.protocol.capture import PlainDtype
from specd.targets import trial
from specd.targets.base import CaptureJob, slot_tensors
from specd.targets.registry import load_target
from specd.targets.sglang.engine import Engine
from specd.targets.sglang.target import SGLangTarget
from specd.targets.synthetic import SyntheticTarget
from specd.targets.transformers.target import TransformersTarget

Load = Callable[[], Any]
Fault = Callable[[list[torch.Tensor]], None]
"""What is done to the taps of one forward: float32 [T, K, H], a tensor a sequence."""
BACKENDS = {"synthetic": SyntheticTarget, "transformers": TransformersTarget, "sglang": SGLangTarget}
LAYER = 1


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def load(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a small sound target of the backend."""
    if backend == "synthetic":
        return lambda: load_target(TargetConfig(model="synthetic:hidden=32,layers=5,vocab=99"))
    if backend == "transformers":
        path = write_target(tmp_path / "model")
        return lambda: load_target(TargetConfig(model=f"{path}/", backend=backend, device="cpu"))
    return sglang(tmp_path, monkeypatch)


def sglang(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 64}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    fake_sglang.install(monkeypatch)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    return lambda: load_target(TargetConfig(model=f"{directory}/", backend="sglang", device="cpu"))


def plant(monkeypatch: pytest.MonkeyPatch, backend: str, fault: Fault) -> None:
    kind: Any = BACKENDS[backend]
    sound = kind.run

    def run(self: Any, fills: Sequence[CaptureJob]) -> Any:
        completion = sound(self, fills)
        if fills[0].spec.taps:
            fault([part for fill in fills for part in torch.split(slot_tensors(fill)["taps"], fill.lengths.tolist())])
        return completion

    monkeypatch.setattr(kind, "run", run)


def zeroed(sequences: list[torch.Tensor]) -> None:
    for taps in sequences:
        taps[:, LAYER] = 0


def broken(sequences: list[torch.Tensor]) -> None:
    sequences[-1][0, LAYER, 3] = torch.nan


def endless(sequences: list[torch.Tensor]) -> None:
    sequences[0][2, LAYER, 0] = -torch.inf


def shifted(sequences: list[torch.Tensor]) -> None:
    for taps in sequences:
        taps[:, LAYER:-1] = taps[:, LAYER + 1 :].clone()


def shared(sequences: list[torch.Tensor]) -> None:
    for taps in sequences[1:]:
        taps[:, LAYER] += sequences[0][-1, LAYER] / 100


def overwritten(sequences: list[torch.Tensor]) -> None:
    for taps in sequences:
        taps[:, LAYER] = sequences[0][0, LAYER]


def leaking_back(sequences: list[torch.Tensor]) -> None:
    if len(sequences) > 1:
        sequences[0][0, LAYER] *= 1.01


def kept() -> Fault:
    forwards = itertools.count()

    def fault(sequences: list[torch.Tensor]) -> None:
        sequences[0][:, LAYER] *= 1 + next(forwards) / 100

    return fault


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (zeroed, "after layer 1 are all zero in 8 of 8 rows"),
        (broken, "after layer 1 hold NaN or infinities in 1 of 8 rows"),
        (endless, "after layer 1 hold NaN or infinities in 1 of 8 rows"),
        (shifted, "captured as layer 1's are those of layer 2"),
        (shared, "after layer 1 of a sequence change with the one packed before it, by up to"),
        (overwritten, "after layer 1 are the same for different tokens"),
        (leaking_back, "after layer 1 differ between sequences in one forward and in one each, by up to 0.01"),
        (kept(), "after layer 1 differ between two forwards of the same tokens"),
    ],
    ids=["zeroed", "nan", "infinite", "shifted", "shared", "overwritten", "leaking back", "kept"],
)
def test_a_planted_fault_is_refused_with_its_layer(
    load: Load, backend: str, fault: Fault, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load().close()
    closed: list[Any] = []
    kind: Any = BACKENDS[backend]
    close = kind.close

    def noted(self: Any) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(kind, "close", noted)
    plant(monkeypatch, backend, fault)
    with pytest.raises(TargetError, match=rf"^target .*{said}.*(--backend|--dtype)"):
        load()
    assert len(closed) == 1


def test_a_hook_on_the_wrong_layer_of_transformers_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = TransformersTarget._forward

    def forward(self: Any, *args: Any) -> None:
        self._layers = [*self._decoder.layers[1:], self._decoder.layers[0]]
        sound(self, *args)

    monkeypatch.setattr(TransformersTarget, "_forward", forward)
    path = write_target(tmp_path / "model")
    with pytest.raises(TargetError, match="what its layer 0 puts out is not the state that transformers reports"):
        load_target(TargetConfig(model=f"{path}/", device="cpu"))


def test_taps_of_sglang_at_the_wrong_layer_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Engine.forward

    def forward(self: Any, tokens: Any, lengths: Any, stop: int, capture: Any) -> None:
        if 0 in capture.taps:
            later = {tap + 1: sink for tap, sink in capture.taps.items()}
            capture = type(capture)(taps=later, final=capture.final)
        sound(self, tokens, lengths, stop, capture)

    load = sglang(tmp_path, monkeypatch)
    monkeypatch.setattr(Engine, "forward", forward)
    with pytest.raises(TargetError, match="captured as layer 0's are those of layer 1"):
        load()


def test_a_state_that_sequences_share_in_sglang_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recurrent(fake_sglang.Layer):
        """Its state runs through all sequences of a forward, and on to the next."""

        def output(self, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
            hidden = hidden + getattr(self, "state", 0)
            self.state = hidden[-1].clone()
            return hidden, residual

    load = sglang(tmp_path, monkeypatch)
    monkeypatch.setattr(fake_sglang.ModelRunner, "layer", Recurrent)
    with pytest.raises(TargetError, match="after layer 0 differ between two forwards of the same tokens"):
        load()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_sound_and_a_stranger_in_the_forward_is_not(
    tmp_path: Path, dtype: PlainDtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_target(tmp_path / "model")
    config = TargetConfig(model=f"{path}/", device="cpu", dtype=dtype)
    with caplog.at_level(logging.WARNING):
        load_target(config).close()
    assert not caplog.records

    def leak(sequences: list[torch.Tensor]) -> None:
        for taps in sequences[1:]:
            taps[:, LAYER] += sequences[0][-1, LAYER]

    plant(monkeypatch, "transformers", leak)
    with pytest.raises(TargetError, match="of a sequence change with the one packed before it"):
        load_target(config)


def test_what_may_be_rounding_is_logged_and_what_cannot_be_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A mixture of experts in a narrow dtype, whose rows meet outside attention."""

    class Noisy(SyntheticTarget):
        def __init__(self, noise: float) -> None:
            super().__init__(TargetConfig(model="synthetic:hidden=32,layers=5,vocab=99", dtype="bfloat16"))
            self._config_json = json.dumps({"num_experts": 8}).encode()
            self._noise, self._random = noise, np.random.default_rng(0)

        def run(self, fills: Sequence[CaptureJob]) -> None:
            super().run(fills)
            for fill in fills:
                taps = slot_tensors(fill)["taps"][:, LAYER]
                taps *= 1 + torch.from_numpy(self._random.normal(0, self._noise, taps.shape)).float()

    with caplog.at_level(logging.INFO):
        trial.try_out(Noisy(0.005))
        assert [record.levelname for record in caplog.records] == ["INFO"]
        trial.try_out(Noisy(0.1))
    assert "after layer 1 differ between two forwards" in caplog.text
    with pytest.raises(TargetError, match="after layer 1 differ between two forwards of the same tokens"):
        trial.try_out(Noisy(2))


def test_a_tiny_vocabulary_is_no_fault() -> None:
    load_target(TargetConfig(model="synthetic:hidden=16,layers=2,vocab=1")).close()
