"""The EAGLE-3 objective on a GPU: the CPU's losses, no wait for the device, nothing compiled in mid-run."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch._inductor.config
from torch._dynamo.utils import counters

from drafts import make_batch
from eagle import deliver, parts
from specd.bench.draft import TINY, run
from specd.config.settings import AttentionKind, TrainConfig
from specd.drafts.base import Tuning
from specd.drafts.eagle3.objective import Eagle3
from specd.drafts.eagle3.settings import Eagle3Config
from specd.protocol.batch import Delivery
from specd.train.optimizer import apply_gradients, make_optimizer

pytestmark = [pytest.mark.gpu(1), pytest.mark.usefixtures("few_compile_workers"), pytest.mark.filterwarnings("ignore")]
CONFIG = Eagle3Config(num_steps=5, draft_vocab_size=60, loss_chunk=128, head_dim=64)


def on_gpu(
    lengths: tuple[int, ...], seed: int = 0, density: float = 0.8, dtype: torch.dtype = torch.bfloat16
) -> Delivery:
    """A batch of sequences of these lengths, its states on the GPU."""
    delivery = deliver(make_batch(lengths, density, seed), seed)
    assert delivery.taps is not None
    assert delivery.final is not None
    return Delivery(delivery.batch, delivery.taps.cuda().to(dtype), delivery.final.cuda().to(dtype))


def gradients(objective: Eagle3, delivery: Delivery) -> dict[str, torch.Tensor]:
    objective.loss(delivery).sum.backward()  # type: ignore[no-untyped-call]
    found = {name: weight.grad.cpu() for name, weight in objective.module.named_parameters() if weight.grad is not None}
    objective.module.zero_grad()
    return found


@pytest.mark.parametrize("changes", [{}, {"norm_output": True, "fc_norm": True}, {"num_heads": 2, "num_kv_heads": 2}])
def test_loss_and_gradients_on_a_gpu_are_the_cpus_and_never_wait_for_the_device(changes: dict[str, Any]) -> None:
    config = msgspec.structs.replace(CONFIG, **changes)
    here, there = Eagle3(config, parts()), Eagle3(config, parts(), "cuda")
    for lengths in ((200, 31, 90), (3, 300), (5,)):
        delivery = on_gpu(lengths, dtype=torch.float32)
        there.warm_up(torch.float32)  # it compiles, and may wait
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = there.loss(delivery)
            loss.sum.backward()  # type: ignore[no-untyped-call]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        there.module.zero_grad()
        cpu = deliver(delivery.batch, 0)
        wanted = here.loss(cpu)
        torch.testing.assert_close(loss.sum.cpu(), wanted.sum, rtol=5e-3, atol=1e-2)
        assert loss.metrics["counted"].tolist() == wanted.metrics["counted"].tolist()
        found, expected = gradients(there, delivery), gradients(here, cpu)
        for name, gradient in expected.items():
            assert float((found[name] - gradient).norm()) <= 1e-2 * float(gradient.norm()), name


def test_optimizer_steps_on_a_gpu_never_wait_and_are_the_same_from_run_to_run() -> None:
    """bfloat16 with float32 masters, batches of changing size: bit by bit the same losses, near the plain path's."""
    given = [on_gpu(lengths, seed) for seed, lengths in enumerate(((300, 31, 90), (700,), (90,), (5, 1)))]

    def losses(sync: str, tuning: Tuning, attention: AttentionKind) -> list[float]:
        settings = msgspec.structs.replace(CONFIG, attention=attention)
        draft = Eagle3(settings, parts(), "cuda", torch.bfloat16, tuning=tuning)
        draft.warm_up(torch.bfloat16)
        optimizer, halted, found = make_optimizer(draft.module, TrainConfig()), torch.zeros((), device="cuda"), []
        torch.cuda.set_sync_debug_mode(sync)
        try:
            for delivery in given:
                loss = draft.loss(delivery)
                loss.sum.backward()  # type: ignore[no-untyped-call]
                _, halted = apply_gradients(optimizer, loss.weight, loss.sum.detach()[None], 1.0, halted)
                found.append(loss.sum.detach() / loss.weight.clamp(min=1))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [value.item() for value in found]

    losses("default", Tuning(), "flex")
    first = losses("error", Tuning(), "flex")
    assert losses("error", Tuning(), "flex") == first
    assert first == pytest.approx(losses("default", Tuning(compiled=False), "sdpa"), rel=0.02)


def test_nothing_is_compiled_after_warming_up() -> None:
    torch._dynamo.reset()
    draft = Eagle3(CONFIG, parts(), "cuda", torch.bfloat16)
    draft.warm_up(torch.bfloat16)
    warmed, rng = counters["stats"]["unique_graphs"], np.random.default_rng(0)
    assert warmed > 0
    for seed in range(20):
        lengths = tuple(rng.integers(1, 900, rng.integers(1, 5)).tolist())
        draft.loss(on_gpu((*lengths, 3), seed, float(rng.random()))).sum.backward()  # type: ignore[no-untyped-call]
    assert counters["stats"]["unique_graphs"] == warmed


def test_the_batch_that_came_first_does_not_show_in_the_gradients() -> None:
    """A resumed run meets another batch first than the run it goes on with."""
    small, large = on_gpu((90,)), on_gpu((700, 300))

    def after(first: Delivery) -> list[torch.Tensor]:
        torch._dynamo.reset()
        draft = Eagle3(CONFIG, parts(), "cuda", torch.bfloat16)
        with torch._inductor.config.patch(force_disable_caches=True):
            gradients(draft, first)
            return [*gradients(draft, small).values(), *gradients(draft, large).values()]

    assert all(torch.equal(one, other) for one, other in zip(after(small), after(large), strict=True))


def test_its_step_is_timed() -> None:
    result = run(steps=2, context=[300], target=TINY | {"head_dim": 64}, name="eagle3")
    assert result.rows[0].step_ms > 0
    assert result.rows[0].peak_gb is not None
