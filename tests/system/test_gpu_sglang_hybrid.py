"""A hybrid of Qwen3.5-35B-A3B's shape in SGLang on one GPU, with dummy weights: what it takes, and who meets whom.

. env.sh of a bundle, or SGLang installed
SPECD_REQUIRE_GPU=1 python3 -m pytest -q -s tests/system/test_gpu_sglang_hybrid.py
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch

from specd.config.settings import TargetConfig
from specd.errors import pip_install
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob, slot_tensors
from specd.targets.registry import load_target
from specd.targets.sglang.recurrent import SHARE, States
from specd.targets.sglang.target import SGLangTarget

pytestmark = [pytest.mark.gpu(1), pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]

TAPS = (1, 10, 19, 28, 37)
TOKENS = 8192
GIB = 2**30


def published() -> dict[str, Any]:
    """transformers' default Qwen3_5MoeConfig, with what SGLang reads of the published config.json besides."""
    transformers: Any = pytest.importorskip("transformers", "5")
    config: dict[str, Any] = transformers.Qwen3_5MoeConfig().to_dict()
    text = config["text_config"]
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": True}
    text |= {"full_attention_interval": 4, "rope_parameters": rope | {"mrope_section": [11, 11, 10]}}
    config["vision_config"] |= {"deepstack_visual_indexes": [], "out_hidden_size": text["hidden_size"]}
    return config | {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def used() -> dict[str, float]:
    return {}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, used: dict[str, float]) -> Iterator[SGLangTarget]:
    if importlib.util.find_spec("sglang") is None:
        pytest.skip(f"SGLang is not installed: {pip_install('sglang')}")
    path = tmp_path_factory.mktemp("qwen3_5_moe")
    (path / "config.json").write_text(json.dumps(published()))
    torch.zeros(1, device="cuda")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # its workers outlive the tests
    before = torch.cuda.mem_get_info()[0]
    made = load_target(
        TargetConfig(
            model=f"{path}/", backend="sglang", load_format="dummy", device="cuda:0", dtype="bfloat16",
            attention_backend="triton", max_forward_tokens=TOKENS,
        )
    )  # fmt: skip
    used["GiB"] = (before - torch.cuda.mem_get_info()[0]) / GIB
    assert isinstance(made, SGLangTarget)
    yield made
    made.close()
    monkeypatch.undo()


def jobs(target: SGLangTarget, groups: Sequence[Sequence[int]]) -> list[CaptureJob]:
    spec = CaptureSpec(taps=TAPS, final=True, dtype="bfloat16")
    made = []
    for seed, lengths in enumerate(groups):
        size = sum(lengths)
        tokens = np.random.default_rng(seed).integers(1000, 200_000, size, dtype=np.int32)
        layout = slot_layout(spec, target.contract.hidden_size, size)
        slot = torch.empty(layout.nbytes, dtype=torch.uint8, device=target.device)
        made.append(CaptureJob(tokens=tokens, lengths=np.array(lengths, np.int32), spec=spec, layout=layout, slot=slot))
    return made


def states(target: SGLangTarget, groups: Sequence[Sequence[int]], merged: bool) -> torch.Tensor:
    """[rows, taps + final, H] of all groups, in one forward or in one for each sequence."""
    made = jobs(target, groups)
    parts = [made] if merged else [[job] for job in _alone(made)]
    for part in parts:
        completion = target.run(part)
        assert completion is not None
        completion.wait()
    found = [slot_tensors(job) for part in parts for job in part]
    return torch.cat([torch.cat([slot["taps"], slot["final"][:, None]], dim=1) for slot in found]).float().cpu()


def _alone(made: Sequence[CaptureJob]) -> list[CaptureJob]:
    apart = []
    for job in made:
        for tokens in np.split(job.tokens, np.cumsum(job.lengths)[:-1]):
            layout = slot_layout(job.spec, job.layout.tensors[0].shape[-1], tokens.size)
            slot = torch.empty(layout.nbytes, dtype=torch.uint8, device=job.slot.device)
            lengths = np.array([tokens.size], np.int32)
            apart.append(CaptureJob(tokens=tokens, lengths=lengths, spec=job.spec, layout=layout, slot=slot))
    return apart


def distances(these: torch.Tensor, those: torch.Tensor) -> torch.Tensor:
    """Of each row, relative to its norm: [rows, taps + final]."""
    found: torch.Tensor = torch.linalg.vector_norm(these - those, dim=2) / torch.linalg.vector_norm(those, dim=2)
    return found


def test_memory_is_as_planned(target: SGLangTarget, used: dict[str, float]) -> None:
    assert target._engine is not None
    runner, text = target._engine.runner, published()["text_config"]
    total = torch.cuda.get_device_properties(0).total_memory
    pool = runner.req_to_token_pool.mamba_pool.mamba_cache
    held = {
        "weights": sum(weight.nbytes for weight in runner.model.parameters()),
        "states": sum(part.nbytes for part in (*pool.conv, pool.temporal)),
        "KV cache": runner.max_total_num_tokens * 10 * 2 * text["num_key_value_heads"] * text["head_dim"] * 2,
        "request table": runner.req_to_token_pool.req_to_token.nbytes,
    }
    slots = pool.temporal.shape[1]
    each = held["states"] / slots
    print(f"\n{target._engine.max_sequences} sequences a forward, {each / 2**20:.1f} MiB of states each")
    print(
        {name: f"{size / GIB:.2f} GiB" for name, size in held.items()}, f"; free memory fell by {used['GiB']:.2f} GiB"
    )
    assert target._engine.max_sequences == slots - 1
    assert 60 * 2**20 <= each <= 64 * 2**20
    assert total / SHARE - each <= held["states"] - each <= total / SHARE
    assert sum(held.values()) / GIB <= used["GiB"] + 0.5
    assert used["GiB"] - sum(held.values()) / GIB <= 4  # buffers of kernels, and what loading left in torch's cache


def test_merged_sequences_have_the_states_that_they_have_alone(
    target: SGLangTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And would not, had they one state: the control says that the measure sees it."""
    assert target._engine is not None
    groups = [(7, 1, 33, 64, 12), (200, 16), (48,) * 10, (90, 5, 5)]
    merged = states(target, groups, merged=True)
    assert torch.equal(states(target, groups, merged=True), merged)
    apart = states(target, groups, merged=False)
    off = distances(merged, apart)
    slots = target._engine.runner.req_to_token_pool.req_index_to_mamba_index_mapping
    kept = slots.clone()
    slots.zero_()
    monkeypatch.setattr(States, "clear", lambda states, count: None)
    try:
        shared = distances(states(target, groups, merged=True), apart)
    finally:
        slots.copy_(kept)
    for name, found in (("merged", off), ("with one state", shared)):
        quantiles = [f"{float(found.flatten().quantile(q)):.4f}" for q in (0.5, 0.9, 0.99, 1)]
        print(f"\n{name}: rows differ from the same alone by {' '.join(quantiles)} (median, 90 %, 99 %, largest)")
    assert float(off.quantile(0.9)) <= 0.03
    assert float(shared.quantile(0.9)) >= 3 * float(off.quantile(0.9))


def test_more_sequences_than_states_run_in_several_forwards(target: SGLangTarget) -> None:
    assert target._engine is not None
    count = target._engine.max_sequences + 5
    groups = [(11,) * count]
    off = distances(states(target, groups, merged=True), states(target, groups, merged=False))
    assert float(off.quantile(0.9)) <= 0.03


def test_rates(target: SGLangTarget) -> None:
    """For people: tokens a second, bare; no bar."""
    for groups in ([(1024,)], [(3072,)], [(512,) * 8], [(1024,) * 8]):
        made, event = jobs(target, groups), cast(Any, torch.cuda.Event)
        events = [event(enable_timing=True) for _ in range(2)]
        for step in range(8):
            if step == 3:
                events[0].record()
            target.run(made)
        events[1].record()
        torch.cuda.synchronize()
        rate = 5 * sum(map(sum, groups)) / events[0].elapsed_time(events[1]) * 1000
        print(f"\n{sum(map(sum, groups))} tokens in {sum(map(len, groups))} sequences: {rate:,.0f} tokens/s")
        assert math.isfinite(rate)
