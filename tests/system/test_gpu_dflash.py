"""Block drafts on a GPU: the CPU's losses, no wait for the device, the same bits from run to run."""

from __future__ import annotations

import msgspec
import pytest
import torch
import torch._inductor.config

from drafts import MASK, make_batch, parts, taps_of
from dspark import deliver
from specd.config.settings import AttentionKind, TrainConfig
from specd.drafts.backbone.objective import BlockObjective
from specd.drafts.backbone.settings import BlockConfig
from specd.drafts.base import Tuning
from specd.drafts.dflash.objective import DFlash
from specd.drafts.dflash.settings import DFlashConfig
from specd.drafts.dflash2.objective import DFlash2
from specd.drafts.dflash2.settings import DFlash2Config
from specd.drafts.dspark.objective import DSpark
from specd.drafts.dspark.settings import DSparkConfig
from specd.protocol.batch import Delivery
from specd.train.optimizer import apply_gradients, make_optimizer

CONFIG = DFlashConfig(
    num_layers=2, num_taps=3, block_size=16, num_anchors=40, loss_chunk=128, head_dim=64, mask_token_id=MASK
)
KINDS: dict[str, tuple[type[BlockObjective], BlockConfig]] = {
    "dflash": (DFlash, CONFIG),
    "dpace": (DFlash, msgspec.structs.replace(CONFIG, loss="dpace")),
    "dflash2": (
        DFlash2,
        DFlash2Config(
            num_layers=2, num_taps=3, block_size=16, num_anchors=40, loss_chunk=128, head_dim=64, mask_token_id=MASK,
            selector_rank=24,
        ),
    ),
    "dspark": (
        DSpark,
        DSparkConfig(
            num_layers=2, num_taps=3, block_size=7, num_anchors=40, loss_chunk=128, head_dim=64, mask_token_id=MASK,
            markov_rank=24,
        ),
    ),
}  # fmt: skip


def on_gpu(lengths: tuple[int, ...], seed: int = 0) -> Delivery:
    """A batch of sequences of these lengths, its states bfloat16 on the GPU."""
    return moved(deliver(make_batch(lengths, seed=seed)), torch.bfloat16)


def moved(delivery: Delivery, dtype: torch.dtype) -> Delivery:
    """A delivery with its states on the GPU."""
    assert delivery.final is not None
    return Delivery(delivery.batch, taps_of(delivery).to("cuda", dtype), delivery.final.to("cuda", dtype))


@pytest.mark.gpu(1)
@pytest.mark.usefixtures("few_compile_workers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_loss_on_a_gpu_equals_the_cpu_and_never_waits_for_the_device(kind: str) -> None:
    make, config = KINDS[kind]
    config = msgspec.structs.replace(config, block_size=8, num_anchors=20, loss_chunk=64)
    delivery = deliver(make_batch((200, 31, 90)))
    on_cpu, on_gpu = make(config, parts()), make(config, parts(), "cuda")
    here = on_cpu.loss(delivery)
    there = moved(delivery, torch.float32)
    on_gpu.loss(there).sum.backward()  # type: ignore[no-untyped-call]
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = on_gpu.loss(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(loss.sum.cpu(), here.sum, rtol=5e-3, atol=1e-2)
    assert loss.metrics["counted"].tolist() == here.metrics["counted"].tolist()


@pytest.mark.gpu(1)
@pytest.mark.usefixtures("few_compile_workers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_steps_on_a_gpu_never_wait_and_are_the_same_from_run_to_run(kind: str) -> None:
    """bfloat16 with float32 masters, batches of changing size: bit by bit the same losses, near the plain path's."""
    given = [on_gpu(lengths, seed) for seed, lengths in enumerate(((300, 31, 90), (700,), (90,)))]

    def losses(sync: str, tuning: Tuning, attention: AttentionKind) -> list[float]:
        make, config = KINDS[kind]
        settings = msgspec.structs.replace(config, attention=attention)
        draft = make(settings, parts(), "cuda", torch.bfloat16, tuning=tuning)
        draft.warm_up(torch.bfloat16)  # it compiles, and may wait
        optimizer, halted, found = make_optimizer(draft.module, TrainConfig()), torch.zeros((), device="cuda"), []
        torch.cuda.set_sync_debug_mode(sync)
        try:
            for delivery in given:
                loss = draft.loss(delivery)
                loss.sum.backward()  # type: ignore[no-untyped-call]
                _, halted = apply_gradients(optimizer, loss.weight, loss.sum.detach()[None], 1.0, halted)
                found.append(loss.sum.detach() / loss.weight)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return [value.item() for value in found]

    losses("default", Tuning(), "flex")
    first = losses("error", Tuning(), "flex")
    assert losses("error", Tuning(), "flex") == first
    plain = losses("default", Tuning(compiled=False, fused_head=False), "sdpa")
    assert first == pytest.approx(plain, rel=0.02)


@pytest.mark.gpu(1)
@pytest.mark.usefixtures("few_compile_workers")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_that_was_compiled_for_does_not_show_in_the_gradients(kind: str) -> None:
    """A resumed run meets another batch first than the run it goes on with."""
    small, large = on_gpu((90,)), on_gpu((700, 300))

    def gradients(first: Delivery) -> torch.Tensor:
        torch._dynamo.reset()
        make, config = KINDS[kind]
        draft = make(config, parts(), "cuda", torch.bfloat16)
        with torch._inductor.config.patch(force_disable_caches=True):
            draft.loss(first).sum.backward()  # type: ignore[no-untyped-call]
            draft.module.zero_grad()
            draft.loss(small).sum.backward()  # type: ignore[no-untyped-call]
            draft.loss(large).sum.backward()  # type: ignore[no-untyped-call]
        return torch.cat([weight.grad.flatten() for weight in draft.module.parameters() if weight.grad is not None])

    assert torch.equal(gradients(small), gradients(large))
