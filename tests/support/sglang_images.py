"""How far SGLang's states of sequences with images are from transformers'; a program: SGLang fills a process.

    python tests/support/sglang_images.py KIND CHECKPOINT cpu TP

prints one JSON line. The checkpoint, a tiny random one of KIND, is made there unless it exists. On the CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vision
from fills import draw_tokens, read
from specd.config.settings import TargetConfig
from specd.errors import TargetError
from specd.protocol import payload
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob, Target
from specd.targets.registry import load_target

SPEC = CaptureSpec(taps=(0, 1, 4), final=True, dtype="float32")
Sequences = Sequence[tuple[Any, payload.Payload]]


def job(sequences: Sequences) -> CaptureJob:
    tokens = np.concatenate([ids for ids, _ in sequences])
    layout = slot_layout(SPEC, vision.HIDDEN, tokens.size)
    brought = tuple(payload for _, payload in sequences)
    return CaptureJob(
        tokens=tokens, lengths=np.array([ids.size for ids, _ in sequences], np.int32), spec=SPEC, layout=layout,
        slot=memoryview(bytearray(b"\xa5" * (layout.nbytes + 64))), payloads=brought if any(brought) else (),
    )  # fmt: skip


def batches(kind: str) -> list[Sequences]:
    """Text beside images, two of the same tokens, and two images in one sequence."""
    (one, first), (_, second) = vision.sequence(kind, 5, 9), vision.sequence(kind, 5, 9, seed=1)
    both = vision.joined(first, second)
    return [
        [(draw_tokens(11, 1) % 240, {}), (one, first), (draw_tokens(7, 2) % 240, {}), (one, second)],
        [(np.concatenate([one, one]), both)],
        [(draw_tokens(33, 3) % 240, {})],
        [(one, {**first, "image_grid_thw": vision.array(torch.tensor([[1, 6, 4]]))})],  # the same pixels, turned
    ]


def run(target: Target, sets: list[Sequences], merged: bool) -> list[CaptureJob]:
    jobs = [job(each) for each in sets]
    for part in [jobs] if merged else [[each] for each in jobs]:
        target.run(part)
    return jobs


def largest(these: list[CaptureJob], those: list[CaptureJob]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one, other in zip(these, those, strict=True):
        expected = read(other)
        for name, rows in read(one).items():
            found[name] = max(found.get(name, 0.0), float((rows - expected[name]).abs().max()))
    return found


def main() -> None:
    kind, path, tp = sys.argv[1], Path(sys.argv[2]), int(sys.argv[4])
    if not path.is_dir():
        vision.write(kind, path)
    common: dict[str, Any] = {"model": f"{path}/", "device": "cpu", "dtype": "float32"}
    reference = load_target(TargetConfig(backend="transformers", **common))
    target = load_target(
        TargetConfig(backend="sglang", attention_backend="torch_native", tp=tp, max_forward_tokens=512, **common)
    )
    sets = batches(kind)
    expected = run(reference, sets, merged=False)
    apart, merged, again = (run(target, sets, merged=how) for how in (False, True, False))
    found: dict[str, Any] = {
        "takes": list(target.contract.payloads),
        "fingerprint": target.contract.fingerprint == reference.contract.fingerprint,
        "apart": largest(apart, expected),
        "merged": largest(merged, expected),
        "again": all(bytes(one.slot) == bytes(other.slot) for one, other in zip(apart, again, strict=True)),
    }
    ids, brought = vision.sequence(kind, 5, 9)
    short = {**brought, "pixel_values": vision.array(vision.payload_tensor(brought["pixel_values"])[1:])}
    try:
        target.run([job([(ids, short)])])
    except TargetError as error:
        found["refused"] = str(error)
    found["after"] = largest(run(target, sets, merged=False), expected)
    target.close()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
