"""The target backends: states equal a plain run of transformers, packed or not, and go straight into the slot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import transformers

from fills import HIDDEN, LENGTHS, SPEC, TAPS, VOCAB, draw_tokens, make_fill, read
from specd.config.settings import TargetConfig
from specd.errors import ConfigError, TargetError
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec, StateDtype
from specd.targets.base import CaptureJob, Target
from specd.targets.registry import load_target

LAYERS = 6
SMALL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "qwen3-window": (
        "qwen3",
        {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 3},
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "jamba": (
        "jamba",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "pad_token_id": 0,
        },
    ),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": HIDDEN, "attention_window_size": 5, "logits_soft_cap": 1e9}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
}
TOLERANCE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}
"""float32. States are of size 1 to 15 here; the largest difference seen is 8e-6 (other summation order in matmuls)."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A directory with a small random checkpoint for each family."""
    paths = {}
    for family, (model_type, extra) in FAMILIES.items():
        config = transformers.AutoConfig.for_model(model_type, **SMALL, **extra)
        factory: Any = transformers.AutoModelForCausalLM
        torch.manual_seed(0)
        model = factory.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.15)
        paths[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(paths[family])
    return paths


@pytest.fixture(scope="module")
def targets(models: dict[str, Path]) -> dict[str, Target]:
    return {family: load_target(TargetConfig(model=f"{path}/", device="cpu")) for family, path in models.items()}


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> dict[str, Any]:
    """The same checkpoints as transformers runs them by itself."""
    factory: Any = transformers.AutoModelForCausalLM
    return {family: factory.from_pretrained(path, dtype=torch.float32) for family, path in models.items()}


@pytest.fixture
def layer_calls() -> Iterator[list[int]]:
    """Indices of the decoder layers that ran, in order; recorded outside specd."""
    calls: list[int] = []

    def record(module: torch.nn.Module, _args: Any) -> None:
        if type(module).__name__.endswith("DecoderLayer"):
            calls.append(next(child.layer_idx for child in module.modules() if hasattr(child, "layer_idx")))  # type: ignore[arg-type]

    handle = torch.nn.modules.module.register_module_forward_pre_hook(record)
    yield calls
    handle.remove()


def plain_states(model: Any, fill: CaptureJob) -> dict[str, torch.Tensor]:
    """taps, final and logits of a plain run: one sequence at a time, no padding, no packing."""
    taps, final, logits = [], [], []
    for piece in torch.split(torch.from_numpy(fill.tokens.astype(np.int64)), fill.lengths.tolist()):
        with torch.no_grad():
            output = model(input_ids=piece[None], output_hidden_states=True, use_cache=False)
        taps.append(torch.stack([output.hidden_states[tap + 1][0] for tap in fill.spec.taps], dim=1))
        final.append(output.hidden_states[-1][0])
        logits.append(output.logits[0])
    return {"taps": torch.cat(taps), "final": torch.cat(final), "logits": torch.cat(logits)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [LENGTHS, (33,)], ids=["packed", "single"])
def test_states_equal_a_plain_run(
    targets: dict[str, Target], plain: dict[str, Any], family: str, lengths: tuple[int, ...]
) -> None:
    fill = make_fill(lengths)
    targets[family].run([fill])
    states, expected = read(fill), plain_states(plain[family], fill)
    torch.testing.assert_close(states["taps"], expected["taps"], **TOLERANCE)
    torch.testing.assert_close(states["final"], expected["final"], **TOLERANCE)
    if len(lengths) == 1:  # the very same operations: not one bit differs
        assert torch.equal(states["taps"], expected["taps"])
        assert torch.equal(states["final"], expected["final"])
    head = np.frombuffer(targets[family].artifact("lm_head"), dtype=np.float32).reshape(VOCAB, HIDDEN)
    logits = states["final"] @ torch.from_numpy(head.copy()).T
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_merged_forwards_equal_separate_ones(targets: dict[str, Target], family: str) -> None:
    target = targets[family]
    fills = [make_fill(LENGTHS, seed=1), make_fill((5,), seed=2), make_fill((3, 40), seed=3)]
    merged = [make_fill(fill.lengths.tolist(), seed=seed) for seed, fill in enumerate(fills, start=1)]
    target.run(merged)
    for fill, other in zip(fills, merged, strict=True):
        target.run([fill])
        torch.testing.assert_close(read(other), read(fill), **TOLERANCE)
        start = 0
        for length in fill.lengths.tolist():
            single = make_fill((length,))
            single.tokens[:] = fill.tokens[start : start + length]
            target.run([single])
            for name, rows in read(single).items():
                torch.testing.assert_close(read(fill)[name][start : start + length], rows, **TOLERANCE)
            start += length


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rerun_is_bit_identical(targets: dict[str, Target], family: str) -> None:
    first, again = make_fill(LENGTHS), make_fill(LENGTHS)
    targets[family].run([first])
    targets[family].run([make_fill((11,), seed=9)])
    targets[family].run([again])
    assert bytes(first.slot) == bytes(again.slot)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (CaptureSpec(taps=(0, 2), dtype="float32"), [0, 1, 2]),
        (CaptureSpec(taps=(0,), dtype="float32"), [0]),
        (CaptureSpec(taps=(0,), final=True, dtype="float32"), list(range(LAYERS))),
        (CaptureSpec(taps=(), final=True, dtype="float32"), list(range(LAYERS))),
    ],
)
def test_no_layer_runs_above_the_last_tap(
    targets: dict[str, Target], layer_calls: list[int], spec: CaptureSpec, expected: list[int]
) -> None:
    targets["llama"].run([make_fill(LENGTHS, spec)])
    assert layer_calls == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_states_are_cast_to_the_slots_dtype(targets: dict[str, Target], dtype: StateDtype) -> None:
    exact, narrow = make_fill(LENGTHS), make_fill(LENGTHS, CaptureSpec(taps=TAPS, final=True, dtype=dtype))
    targets["qwen3"].run([exact])
    targets["qwen3"].run([narrow])
    for name, states in read(exact).items():
        assert torch.equal(read(narrow)[name], states.to(getattr(torch, dtype)))


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen3", False)])
def test_artifacts_are_the_targets_own_bytes(
    targets: dict[str, Target], plain: dict[str, Any], models: dict[str, Path], family: str, tied: bool
) -> None:
    target, model = targets[family], plain[family]
    artifacts = target.contract.artifacts
    assert artifacts["lm_head"].same_as == ("embedding" if tied else "")
    for name, module in (("embedding", model.get_input_embeddings()), ("lm_head", model.get_output_embeddings())):
        data = target.artifact(name)
        assert (artifacts[name].shape, artifacts[name].dtype, artifacts[name].nbytes) == (
            (VOCAB, HIDDEN),
            "float32",
            len(data),
        )
        assert bytes(data) == module.weight.detach().numpy().tobytes()
    config = json.loads(bytes(target.artifact("config.json")))
    assert config == json.loads((models[family] / "config.json").read_text())
    with pytest.raises(KeyError):
        target.artifact("../secret")


def test_the_contract_says_what_the_target_is(targets: dict[str, Target], models: dict[str, Path]) -> None:
    contract = targets["qwen3_moe"].contract
    assert (contract.model_type, contract.hidden_size, contract.num_layers, contract.vocab_size, contract.dtype) == (
        "qwen3_moe",
        HIDDEN,
        LAYERS,
        VOCAB,
        "float32",
    )
    assert contract.model == str(models["qwen3_moe"])
    prints = {target.contract.fingerprint for target in targets.values()}
    assert len(prints) == len(FAMILIES)
    half = load_target(TargetConfig(model=f"{models['llama']}/", dtype="bfloat16", device="cpu"))
    assert half.contract.artifacts["embedding"].dtype == "bfloat16"
    assert half.contract.fingerprint != targets["llama"].contract.fingerprint
    fill = make_fill(LENGTHS, CaptureSpec(taps=TAPS, dtype="bfloat16"))
    half.run([fill])
    assert torch.isfinite(read(fill)["taps"]).all()


def test_a_bad_fill_is_refused_and_the_target_survives(targets: dict[str, Target]) -> None:
    target = targets["llama"]
    long_spec = CaptureSpec(taps=(1, LAYERS - 1), dtype="float32")
    outside, uneven = make_fill((4,)), make_fill((4,))
    outside.tokens[2] = VOCAB
    uneven.lengths[0] = 3
    wrong_slot = CaptureJob(
        tokens=draw_tokens(4),
        lengths=np.array([4], np.int32),
        spec=SPEC,
        layout=slot_layout(SPEC, HIDDEN, 5),
        slot=memoryview(bytearray(1 << 20)),
    )
    other = make_fill((4,), CaptureSpec(taps=(1,), dtype="float32"))
    for fills, reason in (
        ([make_fill((4,), long_spec)], f"legal range 0…{LAYERS - 2}"),
        ([make_fill((4,), CaptureSpec(taps=()))], "captures nothing"),
        ([outside], "leave the vocabulary"),
        ([uneven], "cover all 4 tokens"),
        ([wrong_slot], "layout is not that of 4 tokens"),
        ([make_fill((4,)), other], "one forward captures one spec"),
    ):
        with pytest.raises(TargetError, match=reason):
            target.run(fills)
    fill = make_fill(LENGTHS)
    target.run([fill])
    assert torch.isfinite(read(fill)["taps"]).all()


def test_running_out_of_memory_is_a_target_error(targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory for 1 TB")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", full)
    with pytest.raises(TargetError, match=r"forward of 4 tokens failed.*no memory"):
        targets["llama"].run([make_fill((4,))])


def test_a_model_that_does_not_fit_is_a_target_error(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no memory for 1 TB")

    monkeypatch.setattr("specd.targets.transformers.target.load_network", full)
    with pytest.raises(TargetError, match=r"does not fit in the memory of cpu: no memory.*--device"):
        load_target(TargetConfig(model=f"{models['llama']}/", device="cpu"))


@pytest.mark.gpu(2)
def test_a_target_on_another_gpu_records_its_event_there(models: dict[str, Path], targets: dict[str, Target]) -> None:
    """The thread's own current device is the first one: neither its kernels nor its event may go there."""
    fill, expected = make_fill(LENGTHS), make_fill(LENGTHS)
    targets["llama"].run([expected])
    target = load_target(TargetConfig(model=f"{models['llama']}/", device="cuda:1"))
    assert target.device == "cuda:1"
    slot = torch.zeros(fill.layout.nbytes, dtype=torch.uint8, device="cuda:1")
    assert torch.cuda.current_device() == 0
    completion = target.run([msgspec.structs.replace(fill, slot=slot)])
    assert completion is not None
    completion.wait()
    assert torch.cuda.current_stream("cuda:1").query()
    fill.slot[: fill.layout.nbytes] = slot.cpu().numpy().data
    torch.testing.assert_close(read(fill), read(expected), rtol=2e-3, atol=2e-3)


def test_threads_are_set_where_forwards_run(models: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        load_target(TargetConfig(model=f"{models['llama']}/", threads=2, device="cpu")).run([make_fill((4,))])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_closed_target_says_so(models: dict[str, Path]) -> None:
    target = load_target(TargetConfig(model=f"{models['llama']}/", device="cpu"))
    embedding = target.artifact("embedding")
    target.close()
    target.close()
    assert len(embedding) == VOCAB * HIDDEN * 4
    with pytest.raises(TargetError, match="closed"):
        target.run([make_fill((4,))])


def test_hybrids_are_tapped_at_any_layer(targets: dict[str, Target]) -> None:
    assert targets["qwen3_next"].contract.tap_layers == ()


@pytest.mark.parametrize(("family", "one_by_one"), [("qwen3_next", True), ("jamba", True), ("qwen3_moe", False)])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_state_that_runs_into_the_next_sequence_is_found_though_no_config_says_so(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, one_by_one: bool, load_format: Any
) -> None:
    monkeypatch.setattr("specd.targets.transformers.target.recurrent", lambda config: "")
    target: Any = load_target(TargetConfig(model=f"{models[family]}/", device="cpu", load_format=load_format))
    assert bool(target.alone) is one_by_one
    packed, last = make_fill(LENGTHS), make_fill(LENGTHS[-1:])
    last.tokens[:] = packed.tokens[-LENGTHS[-1] :]
    target.run([packed])
    target.run([last])
    for name, rows in read(last).items():
        torch.testing.assert_close(read(packed)[name][-LENGTHS[-1] :], rows, **TOLERANCE)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"backend 'vllm'.*transformers"):
        load_target(TargetConfig(model="synthetic:", backend="vllm"))
    with pytest.raises(ConfigError, match="synthetic:KEY=NUMBER"):
        load_target(TargetConfig(model="smollm2-135m", backend="synthetic"))


@pytest.mark.gpu(1)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gpu_agrees_with_the_cpu(models: dict[str, Path], targets: dict[str, Target], family: str) -> None:
    """bfloat16 through the varlen kernel, against float32 on the CPU: within bfloat16's error over six layers.

    That of recurrent layers with few experts is 0.15 on the CPU, too.
    """
    expected = make_fill(LENGTHS)
    targets[family].run([expected])
    for dtype, limit in (("float32", 2e-3), ("bfloat16", 0.3 if family in ("qwen3_next", "jamba") else 6e-2)):
        target = load_target(TargetConfig(model=f"{models[family]}/", device="cuda", dtype=dtype))  # type: ignore[arg-type]
        assert target.device == "cuda:0"
        fill = make_fill(LENGTHS)
        slot = torch.zeros(fill.layout.nbytes, dtype=torch.uint8, device="cuda")
        completion = target.run([msgspec.structs.replace(fill, slot=slot)])
        assert completion is not None
        completion.wait()
        fill.slot[: fill.layout.nbytes] = slot.cpu().numpy().data
        for name, states in read(fill).items():
            reference = read(expected)[name]
            assert (states - reference).norm() / reference.norm() < limit, (family, dtype, name)
        assert len(target.artifact("lm_head")) == target.contract.artifacts["lm_head"].nbytes
