"""How far states of SGLang's prefill graphs are from those without, and from transformers'; a program.

    python tests/support/sglang_graphs.py FAMILY CHECKPOINT DEVICE

prints one JSON line. On the CPU the graphs are recordings of tensor operations (sglang_cpu_graphs.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import sglang_cpu_graphs
from sglang_states import TAPS, checkpoint, distance, run
from specd.config.settings import TargetConfig
from specd.protocol.capture import CaptureSpec
from specd.targets.registry import load_target
from specd.targets.sglang.target import SGLangTarget

SIZES = (128, 256, 512)
GROUPS = ((100,), (60, 1, 49), (128,), (63,))
"""The last one is too short for a graph, alone."""


def main() -> None:
    family, path, device = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    kind = device.partition(":")[0]
    if kind == "cpu":
        sglang_cpu_graphs.install(SIZES)
    if not path.is_dir():
        checkpoint(family, path, kind)
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    name: Any = str(dtype).removeprefix("torch.")
    attention = "torch_native" if kind == "cpu" else "triton"
    reference = load_target(TargetConfig(model=f"{path}/", backend="transformers", device=device, dtype=name))
    target = load_target(
        TargetConfig(
            model=f"{path}/", backend="sglang", device=device, dtype=name, attention_backend=attention,
            max_forward_tokens=512, memory_fraction=0.5, prefill_graphs=SIZES,
        )
    )  # fmt: skip
    assert isinstance(target, SGLangTarget)
    assert target._engine is not None
    graphs, runner = target._engine._graphs, target._engine.runner.prefill_cuda_graph_runner
    assert graphs is not None
    replayed: list[int] = []
    execute = runner.execute

    def counted(batch: Any, **given: Any) -> Any:
        replayed.append(len(batch.input_ids))
        return execute(batch, **given)

    runner.execute = counted
    found: dict[str, Any] = {}
    for what, spec in (
        ("taps+final", CaptureSpec(taps=TAPS, final=True, dtype=name)),
        ("taps", CaptureSpec(taps=TAPS, dtype=name)),
    ):
        expected = run(reference, GROUPS, spec, merged=False)
        with graphs.off():
            eager = run(target, GROUPS, spec, merged=False)
        for how in ("", " merged"):
            replayed.clear()
            states = run(target, GROUPS, spec, merged=bool(how))
            found[what + how] = {
                "replayed": list(replayed),
                "eager": distance(states, eager, dtype),
                "transformers": distance(states, expected, dtype),
            }
    target.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
