"""The synthetic target: its states are a pure function, its cost is configured, and it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import fake_cuda
from fills import LENGTHS, TAPS, make_fill, read
from specd.config.settings import TargetConfig
from specd.errors import ConfigError, TargetError
from specd.protocol.capture import CaptureSpec, StateDtype
from specd.targets.base import Target
from specd.targets.registry import load_target


def synthetic(options: str = "", **config: Any) -> Target:
    return load_target(TargetConfig(model=f"synthetic:{options}", **config))


def test_synthetic_states_depend_on_token_position_and_layer_alone() -> None:
    target = synthetic("hidden=64,vocab=256")
    whole, again, other = make_fill(LENGTHS), make_fill(LENGTHS), make_fill(LENGTHS, seed=1)
    target.run([whole, again])
    synthetic("hidden=64,vocab=256").run([other])
    assert bytes(whole.slot) == bytes(again.slot)
    assert bytes(whole.slot) != bytes(other.slot)
    states = read(whole)
    assert states["taps"].abs().max() <= 1
    assert states["taps"].std().item() == pytest.approx(3**-0.5, rel=0.05)
    wide = make_fill(LENGTHS, CaptureSpec(taps=(1, 2, 3, 4), dtype="float32"))
    target.run([wide])
    assert torch.equal(read(wide)["taps"][:, 1], states["taps"][:, 1])  # layer 2 in both
    assert not torch.equal(read(wide)["taps"][:, 0], read(wide)["taps"][:, 1])
    tail = make_fill((16,))
    tail.tokens[:] = whole.tokens[-16:]
    target.run([tail])
    assert torch.equal(read(tail)["final"], states["final"][-16:])
    seeded = make_fill(LENGTHS)
    synthetic("hidden=64,vocab=256,seed=1").run([seeded])
    assert not torch.equal(read(seeded)["final"], states["final"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_synthetic_dtypes_round_as_torch_does(dtype: StateDtype) -> None:
    target = synthetic("hidden=64,vocab=256")
    exact, narrow = make_fill((300,)), make_fill((300,), CaptureSpec(taps=TAPS, final=True, dtype=dtype))
    target.run([exact])
    target.run([narrow])
    for name, states in read(exact).items():
        assert torch.equal(read(narrow)[name], states.to(getattr(torch, dtype)))


def states_on(device: str, slot: torch.Tensor, dtype: StateDtype) -> bytes:
    """The slot's bytes after a run of a synthetic target on a GPU."""
    fill = make_fill((300, 17), CaptureSpec(taps=TAPS, final=True, dtype=dtype))
    target = synthetic("hidden=64,vocab=256,seed=7", device=device)
    completion = target.run([msgspec.structs.replace(fill, slot=slot[: fill.layout.nbytes])])
    assert (completion is not None) == slot.is_cuda
    if completion is not None:
        completion.wait()
    return slot[: fill.layout.nbytes].cpu().numpy().tobytes()


def states_on_cpu(dtype: StateDtype) -> bytes:
    fill = make_fill((300, 17), CaptureSpec(taps=TAPS, final=True, dtype=dtype))
    fill.slot[:] = bytes(len(fill.slot))
    target = synthetic("hidden=64,vocab=256,seed=7")
    assert target.device == "cpu"
    assert target.run([fill]) is None
    return bytes(fill.slot[: fill.layout.nbytes])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_synthetic_states_have_the_same_bits_on_a_device(dtype: StateDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of the device, done by torch on the CPU; in steps of a few rows, too."""
    fake_cuda.install(monkeypatch)
    slot = torch.zeros(1 << 20, dtype=torch.uint8)
    assert states_on("cuda:1", slot, dtype) == states_on_cpu(dtype)
    monkeypatch.setattr("specd.targets.synthetic._DEVICE_CHUNK_BYTES", 5000)
    assert states_on("cuda", slot.zero_(), dtype) == states_on_cpu(dtype)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
def test_synthetic_states_have_the_same_bits_on_a_gpu(dtype: StateDtype) -> None:
    slot = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda:0")
    assert states_on("cuda", slot, dtype) == states_on_cpu(dtype)


@pytest.mark.parametrize("device", ["cuda:2", "cuda:x", "mps", "gpu"])
def test_synthetic_devices_that_are_missing_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.install(monkeypatch)
    with pytest.raises(ConfigError, match=f"device '{device}' of a synthetic target.*use auto, cpu or cuda:N"):
        synthetic(device=device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_synthetic_artifacts_have_the_size_the_contract_says(dtype: str) -> None:
    target = synthetic("hidden=48,vocab=100,layers=5", dtype=dtype)
    rows = {}
    for name in ("embedding", "lm_head"):
        ref = target.contract.artifacts[name]
        rows[name] = torch.frombuffer(bytearray(target.artifact(name)), dtype=getattr(torch, ref.dtype)).view(ref.shape)
        assert rows[name].shape == (100, 48)
        assert rows[name].float().std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.equal(rows["embedding"], rows["lm_head"])
    config = json.loads(bytes(target.artifact("config.json")))
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (48, 5, 100)
    with pytest.raises(KeyError):
        target.artifact("tokenizer.json")


def test_synthetic_targets_sleep_as_long_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    target = synthetic("hidden=64,vocab=256,ms=20,us_per_token=2.5")
    monkeypatch.setattr(time, "sleep", naps.append)
    target.run([make_fill((4,)), make_fill((6,))])
    assert naps == [pytest.approx(0.020 + 10 * 2.5e-6)]


@pytest.mark.parametrize("options", ["hidden=0", "layers=1", "width=3", "hidden", "hidden=x", "ms=-1"])
def test_synthetic_options_are_checked(options: str) -> None:
    with pytest.raises(ConfigError, match="model 'synthetic:"):
        synthetic(options)


def test_synthetic_fills_are_checked() -> None:
    target = synthetic("hidden=64,vocab=100")
    with pytest.raises(TargetError, match="vocabulary"):
        target.run([make_fill((50,))])
    with pytest.raises(TargetError, match="legal range"):
        target.run([make_fill((4,), CaptureSpec(taps=(7,)))])
    with pytest.raises(TargetError, match="layout"):
        target.run([make_fill((4,), hidden=32)])


def test_the_synthetic_target_needs_no_torch() -> None:
    code = (
        "import sys, numpy as np\n"
        "from specd.protocol.capture import CaptureSpec\n"
        "from specd.config.settings import TargetConfig\n"
        "from specd.protocol.batch import slot_layout\n"
        "from specd.targets.registry import load_target\n"
        "from specd.targets.base import CaptureJob\n"
        "target = load_target(TargetConfig(model='synthetic:hidden=8'))\n"
        "spec = CaptureSpec(taps=(1,))\n"
        "layout = slot_layout(spec, 8, 3)\n"
        "one = dict(tokens=np.arange(3, dtype=np.int32), lengths=np.array([3], np.int32))\n"
        "target.run([CaptureJob(**one, spec=spec, layout=layout, slot=memoryview(bytearray(layout.nbytes)))])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch came along'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)
