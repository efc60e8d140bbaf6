"""What SGLang keeps for a whole process: a trainer that compiles beside it, and a load after one that failed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import fake_sglang
from fake_sglang import ModelRunner
from fills import make_fill, read
from specd.config.settings import TargetConfig
from specd.errors import TargetError
from specd.protocol.capture import CaptureSpec
from specd.targets.artifacts import Artifacts
from specd.targets.registry import load_target
from specd.targets.sglang.engine import Engine
from specd.targets.sglang.target import SGLangTarget

SPEC = CaptureSpec(taps=(0, 2), final=True, dtype="float32")


def test_what_sglang_compiled_runs_while_a_trainer_compiles_in_the_same_process(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch marks the whole process as tracing, where a compiled function refuses to be called."""
    compiled = torch.compile(torch.neg, backend="eager")

    class Compiled(fake_sglang.Layer):
        def forward(self, hidden: Any, residual: torch.Tensor | None, *, batch: Any) -> Any:
            compiled(torch.ones(1))
            return super().forward(hidden, residual, batch=batch)

    monkeypatch.setattr(ModelRunner, "layer", Compiled)
    inside, over = threading.Event(), threading.Event()

    def compiled_elsewhere(number: torch.Tensor) -> torch.Tensor:
        inside.set()
        assert over.wait(60)
        return number * 2

    target = load_target(config)
    assert isinstance(target, SGLangTarget)
    trainer = threading.Thread(target=make_fx(compiled_elsewhere), args=(torch.ones(1),))
    trainer.start()
    try:
        assert inside.wait(60)
        fill = make_fill((7, 5), SPEC)
        target.run([fill])
        assert target._engine is not None
        torch.testing.assert_close(read(fill), fake_sglang.plain(target._engine.model, fill))
    finally:
        over.set()
        trainer.join()
        target.close()


@pytest.mark.parametrize("where", ["forward", "weights", "contract"])
def test_after_a_load_that_failed_the_next_one_succeeds(
    config: TargetConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A worker that is a thread of its trainer's process starts again there."""
    with monkeypatch.context() as patched:
        failure = RuntimeError("no memory")
        if where == "forward":
            patched.setattr(ModelRunner, "fail", failure)
            # Nor does what fails at its end hide why it failed.
            state = sys.modules["sglang.srt.distributed.parallel_state"]
            patched.setattr(state, "destroy_distributed_environment", raiser(OSError("gone")))
        elif where == "weights":
            patched.setattr(Engine, "weights", raiser(failure))
        else:
            patched.setattr(Artifacts, "contract", raiser(failure))
        with pytest.raises(RuntimeError if where == "contract" else TargetError, match="no memory"):
            load_target(config)
    load_target(config).close()


def raiser(error: Exception) -> Callable[..., Any]:
    def raises(*given: Any) -> None:
        raise error

    return raises
