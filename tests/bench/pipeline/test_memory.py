"""Memory of the sides of a pipeline: of whole devices, or resident."""

from __future__ import annotations

import os

import pytest
import torch

from specd.bench.pipeline import memory as pipeline_memory
from specd.bench.pipeline.settings import Settings

TINY = "synthetic:hidden=32,layers=8,vocab=64"


def test_memory_is_that_of_all_devices_of_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {f"cuda:{index}": 1 << index for index in range(5)}
    monkeypatch.setattr(pipeline_memory, "memory", lambda device: used[device])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    apart = Settings(model=TINY, target={"tp": 2}, devices=("cuda:0", "cuda:2"), trainer="cuda:4")
    before = pipeline_memory.in_use(apart)
    assert before == used
    used |= {f"cuda:{index}": (1 << index) + 1000 + index for index in range(5)}
    assert pipeline_memory.held(apart, before, ()) == (4006, 1004)
    shared = Settings(model=TINY, devices=("cuda:0", "cuda:1"), trainer="cuda:1")
    assert pipeline_memory.held(shared, before, ()) == (2001 - 300, 300)


def test_on_the_cpu_it_is_the_peak_resident_size() -> None:
    here = pipeline_memory.memory("cpu")
    assert here > 1 << 20
    settings = Settings(model=TINY)
    assert pipeline_memory.in_use(settings) == {}
    daemons, trainer = pipeline_memory.held(settings, {}, [os.getpid(), os.getpid()])
    assert daemons == 2 * trainer >= 2 * here
    assert pipeline_memory.memory("cpu", 2**22 + 1) == 0, "no such process"
