"""The SGLang backend without SGLang: which backend runs, what is refused, and the whole target over a fake runner."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fake_sglang
from fake_sglang import HIDDEN, LAYERS, VOCAB, ModelRunner
from fake_sglang_stream import Gated
from fills import draw_tokens, make_fill, read
from specd.cli import start as start_verb
from specd.config.load import convert
from specd.config.settings import DaemonConfig, TargetConfig
from specd.errors import ConfigError, TargetError, pip_install
from specd.protocol.capture import CaptureSpec
from specd.targets.registry import load_target
from specd.targets.sglang.rank import read_frame
from specd.targets.sglang.setup import RankSetup
from specd.targets.sglang.target import SGLangTarget
from specd.targets.sglang.touch_points import TOUCH_POINTS, touch_points

SPEC = CaptureSpec(taps=(0, 2), final=True, dtype="float32")
TAPS_ONLY = CaptureSpec(taps=(0, 2), dtype="float32")


@pytest.fixture
def target(config: TargetConfig) -> Iterator[SGLangTarget]:
    made = load_target(config)
    assert isinstance(made, SGLangTarget)
    yield made
    made.close()


def plain(target: SGLangTarget, fill: Any) -> dict[str, torch.Tensor]:
    assert target._engine is not None
    return fake_sglang.plain(target._engine.model, fill)


def test_states_are_the_residual_stream_and_what_lm_head_reads(target: SGLangTarget) -> None:
    for lengths in ((7, 1, 23, 16), (33,)):
        fill = make_fill(lengths, SPEC)
        assert target.run([fill]) is None
        torch.testing.assert_close(read(fill), plain(target, fill))


def test_merged_fills_get_their_own_rows(target: SGLangTarget) -> None:
    merged = [make_fill((5, 9), SPEC), make_fill((12,), SPEC, seed=3), make_fill((1, 1), SPEC, seed=4)]
    target.run(merged)
    for fill in merged:
        torch.testing.assert_close(read(fill), plain(target, fill))


def test_nothing_runs_above_the_last_tap(target: SGLangTarget) -> None:
    assert target._engine is not None
    layers: list[Any] = list(target._engine.layers)
    before = [layer.calls for layer in layers]
    fill = make_fill((6, 2), TAPS_ONLY)
    target.run([fill])
    assert [layer.calls - b for layer, b in zip(layers, before, strict=True)] == [1, 1, 1, 0, 0]
    assert not layers[2]._forward_hooks
    full = make_fill((6, 2), SPEC)
    target.run([full])
    assert torch.equal(read(fill)["taps"], read(full)["taps"])
    assert [layer.calls - b for layer, b in zip(layers, before, strict=True)] == [2, 2, 2, 1, 1]


def test_states_are_written_in_the_dtype_asked_for(target: SGLangTarget) -> None:
    narrow, wide = make_fill((9,), CaptureSpec(taps=(1,), final=True, dtype="bfloat16")), make_fill((9,), SPEC)
    target.run([narrow])
    target.run([wide])
    assert torch.equal(read(narrow)["final"], read(wide)["final"].to(torch.bfloat16))


def test_contract_and_artifacts(target: SGLangTarget, checkpoint: Path) -> None:
    assert target._engine is not None
    contract = target.contract
    assert (contract.hidden_size, contract.num_layers, contract.vocab_size) == (HIDDEN, LAYERS, VOCAB)
    assert (contract.model_type, contract.dtype, contract.model) == ("qwen3", "float32", str(checkpoint))
    assert contract.artifacts["lm_head"].shape == (VOCAB, HIDDEN)  # SGLang pads it
    head = np.frombuffer(target.artifact("lm_head"), np.float32).reshape(VOCAB, HIDDEN)
    assert np.array_equal(head, target._engine.model.lm_head.weight.detach().numpy()[:VOCAB])
    assert json.loads(bytes(target.artifact("config.json")))["model_type"] == "qwen3"


@pytest.mark.parametrize(
    ("lengths", "said"),
    [((60, 41), "101 tokens, at most 100 fit its forward"), ((65,), "65 tokens in one sequence, at most 64")],
)
def test_too_much_for_one_forward_is_refused(target: SGLangTarget, lengths: tuple[int, ...], said: str) -> None:
    with pytest.raises(TargetError, match=said):
        target.run([make_fill(lengths, SPEC)])
    target.run([make_fill((3,), SPEC)])


def test_a_failed_forward_leaves_the_target_alive(target: SGLangTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "fail", RuntimeError("no memory"))
    with pytest.raises(TargetError, match="a forward of 3 tokens failed: no memory"):
        target.run([make_fill((3,), SPEC)])
    monkeypatch.setattr(ModelRunner, "fail", None)
    fill = make_fill((3,), SPEC)
    target.run([fill])
    torch.testing.assert_close(read(fill), plain(target, fill))


def test_a_closed_target_says_so(config: TargetConfig) -> None:
    target = load_target(config)
    target.close()
    target.close()
    with pytest.raises(TargetError, match="is closed"):
        target.run([make_fill((3,), SPEC)])


@pytest.mark.parametrize("config", ["0.5.14", "0.5.17"], indirect=True)
def test_a_model_with_another_residual_convention_is_refused(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Negated(fake_sglang.Layer):
        def output(self, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
            return residual, -hidden  # its norm would subtract

    class Odd(fake_sglang.Norm):
        def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            return super().forward(hidden, None if residual is None else -residual)

    monkeypatch.setattr(ModelRunner, "layer", Negated)
    monkeypatch.setattr(fake_sglang, "Norm", Odd)
    with pytest.raises(TargetError, match="does not end in the norm of its last layer"):
        load_target(config)


class Triple(fake_sglang.Layer):
    """As DeepSeek's with sparse attention."""

    def output(self, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        return hidden, residual, None


@pytest.mark.parametrize("config", ["0.5.14", "0.5.17"], indirect=True)
def test_a_third_output_is_none_of_the_states(config: TargetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelRunner, "layer", Triple)
    target = load_target(config)
    fill = make_fill((6, 2), SPEC)
    target.run([fill])
    assert isinstance(target, SGLangTarget)
    torch.testing.assert_close(read(fill), plain(target, fill))
    target.close()


@pytest.mark.parametrize("config", ["0.5.14", "0.5.17"], indirect=True)
def test_layers_of_another_form_are_refused(config: TargetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Quadruple(fake_sglang.Layer):
        def output(self, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
            return hidden, residual, None, None

    monkeypatch.setattr(ModelRunner, "layer", Quadruple)
    with pytest.raises(TargetError, match="neither"):
        load_target(config)


def test_the_check_against_sglangs_own_capture_leaves_no_trace(
    target: SGLangTarget, caplog: pytest.LogCaptureFixture
) -> None:
    assert target._engine is not None
    model: Any = target._engine.model
    assert not caplog.records
    assert model.capture_aux_hidden_states is False
    assert not any(hasattr(layer, "_is_layer_to_capture") for layer in model.model.layers)


def test_a_draft_that_would_be_fed_other_states_is_told_of(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fake_sglang.Model, "off_by", 1)
    target = load_target(config)
    assert [record.getMessage()[:8] for record in caplog.records] == ["layer 0:", "layer 2:"]
    assert "what SGLang's Model feeds to a draft differs by" in caplog.text
    target.run([make_fill((3,), SPEC)])
    target.close()


def test_a_capture_that_fails_is_told_of(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fake_sglang.Model, "off_by", 10)
    target = load_target(config)
    assert "SGLang's own capture of layers [0, 2] fails" in caplog.text
    fill = make_fill((3,), SPEC)
    target.run([fill])
    assert isinstance(target, SGLangTarget)
    torch.testing.assert_close(read(fill), plain(target, fill))
    target.close()


@pytest.mark.parametrize("config", ["0.5.23"], indirect=True)
def test_residuals_that_are_no_addition_come_from_sglangs_own_capture(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_sglang.Layer, "update", Gated())
    target = load_target(config)
    assert isinstance(target, SGLangTarget)
    for spec in (SPEC, TAPS_ONLY, CaptureSpec(taps=(), final=True, dtype="float32")):
        fills = [make_fill((5, 9), spec), make_fill((4,), spec, seed=3)]
        target.run(fills)
        for fill in fills:
            expected = plain(target, fill)
            torch.testing.assert_close(read(fill), {name: expected[name] for name in read(fill)})
    other = make_fill((7,), CaptureSpec(taps=(1,), dtype="float32"))
    target.run([other])
    assert not torch.equal(read(other)["taps"], plain(target, other)["taps"][:, :1])
    target.close()


@pytest.mark.parametrize("config", ["0.5.23"], indirect=True)
def test_residuals_that_are_no_addition_are_refused_without_such_a_capture(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_sglang.Layer, "update", Gated())
    monkeypatch.delattr(fake_sglang.Model, "set_dflash_layers_to_capture")
    with pytest.raises(
        TargetError, match=r"residual stream by Gated, expected an addition; use --backend transformers"
    ):
        load_target(config)


def test_all_touch_points_are_found(config: TargetConfig) -> None:
    found = touch_points()
    assert set(found.symbols) == {touch.symbol for touch in TOUCH_POINTS if touch.used(found.version)}


@pytest.mark.parametrize("config", ["0.5.17"], indirect=True)
@pytest.mark.parametrize("version", ["0.5.13", "0.5.19", "0.5.21", "0.5.24", "0.6.0.dev1", "0.4.9.post1"])
def test_another_version_is_refused(config: TargetConfig, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("sglang.__version__", version)
    expected = rf"sglang {version} is installed, expected 0.5.14 to 0.5.18 or 0.5.22 to 0.5.23; .*sglang\]"
    with pytest.raises(ConfigError, match=expected):
        touch_points()


def test_a_changed_touch_point_is_named(config: TargetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["sglang.srt.model_executor.model_runner"]
    monkeypatch.setattr(module, "ModelRunner", type("ModelRunner", (), {}))
    with pytest.raises(ConfigError, match=r"model_runner\.ModelRunner has no model_config, mem_fraction_static"):
        load_target(config)
    monkeypatch.delattr(module, "ModelRunner")
    with pytest.raises(ConfigError, match=r"no usable sglang\.srt\.model_executor\.model_runner\.ModelRunner"):
        load_target(config)


def test_sglang_that_is_not_installed_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ConfigError, match=rf"'sglang' is not installed; .*{re.escape(pip_install('sglang'))}"):
        load_target(TargetConfig(model=f"{checkpoint}/", backend="sglang", device="cpu"))


def test_the_cpu_needs_its_engine(config: TargetConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE")
    with pytest.raises(ConfigError, match="SGLANG_USE_CPU_ENGINE=1"):
        load_target(config)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"tp": 2}, "target.tp=2 is no setting of the backend"),
        ({"memory_fraction": 0.5}, "target.memory_fraction=0.5 is no setting"),
        ({"attention_backend": "triton"}, "target.attention_backend=triton is no setting"),
        ({"tp": 0}, "target.tp=0"),
        ({"memory_fraction": 1.5}, "target.memory_fraction=1.5"),
    ],
)
def test_settings_of_sglang_are_refused_elsewhere(setting: dict[str, Any], said: str) -> None:
    settings = {"model": "synthetic:hidden=32,layers=4,vocab=64"} | setting
    with pytest.raises(ConfigError, match=said):
        load_target(convert(settings, TargetConfig, "test"))


def test_the_flags_reach_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def serve(daemon: DaemonConfig, ready_fd: int) -> int:
        seen.append(daemon)
        return 0

    monkeypatch.setattr(start_verb, "_serve", serve)
    from typer.testing import CliRunner

    from specd.cli.main import app

    flags = ["--backend", "sglang", "--tp", "2", "--memory-fraction", "0.5", "--attention-backend", "triton"]
    result = CliRunner().invoke(app, ["start", "--model", "Qwen3-30B-A3B-FP8", *flags])
    assert result.exit_code == 0, result.output
    asked = seen[0].target
    assert (asked.backend, asked.tp, asked.memory_fraction, asked.attention_backend) == ("sglang", 2, 0.5, "triton")


def test_a_dead_rank_ends_the_process() -> None:
    """The rank dies because it has nothing to load; its parent would wait for ever."""
    setup = RankSetup(
        path="/nowhere", load_format="auto", dtype="float32", device="cpu", gpu=0, tp=2, port=1,
        memory_fraction=0.5, attention_backend="", max_tokens=8, context=8,
    )  # fmt: skip
    code = f"import threading; from specd.targets.sglang.ranks import *; Ranks({setup!r}); threading.Event().wait(60)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "tensor-parallel rank 1 died" in ended.stderr


def test_a_rank_dies_with_its_parent() -> None:
    inner = "import os, sys, time; from specd.targets.sglang.rank import die_with; die_with(os.getppid()); " + (
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        rank = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            assert select.select([rank], [], [], 20)[0]
        finally:
            os.close(rank)


def test_a_cut_frame_ends_a_rank(tmp_path: Path) -> None:
    whole = (5).to_bytes(4, "little") + b"abcde"
    for cut, expected in ((len(whole), b"abcde"), (7, None), (2, None), (0, None)):
        (tmp_path / "frames").write_bytes(whole[:cut])
        with open(tmp_path / "frames", "rb") as stream:
            assert read_frame(stream) == expected


def test_tokens_outside_the_vocabulary_never_reach_the_runner(
    target: SGLangTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "fail", AssertionError("it ran"))
    fill = make_fill((4,), SPEC)
    fill.tokens[:] = draw_tokens(4) + VOCAB
    with pytest.raises(TargetError, match="leave the vocabulary"):
        target.run([fill])
