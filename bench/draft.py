"""How long a training step of a DFlash draft takes, and how much of what the device's matmuls can do it uses.

The states are random and already on the device: this is the trainer alone. Every step draws its own anchors, as in
training. Shape legend: T context tokens, N block tokens, R predictions, H hidden size, V vocabulary, n taps,
Q query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import torch

from specd.bench.machine import machine
from specd.config.settings import DFlashConfig, TrainConfig
from specd.drafts.blocks import Blocks, make_blocks, sample_anchors
from specd.drafts.dflash.model import DraftShape
from specd.drafts.dflash.objective import DFlash, Tuning
from specd.errors import ConfigError
from specd.protocol.batch import Batch, Delivery
from specd.protocol.contract import TargetContract
from specd.train.optimizer import apply_gradients, make_optimizer

CONTEXTS: Final = (1024, 3072, 10240)
WARM_UP: Final = 3
QWEN3_30B: Final[dict[str, Any]] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1e6,
}  # fmt: skip
TINY: Final[dict[str, Any]] = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960, "rope_theta": 1e6,
}  # fmt: skip
"""What a machine without a GPU is asked for, so that the command answers at all."""


class Variant(NamedTuple):
    """One way to compute the same step."""

    config: DFlashConfig
    tuning: Tuning = Tuning()


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One context length and variant. Times are of whole optimizer steps, back to back, by the device's clock.

    useful_tflop: of one step, by part, without anything computed twice. ceiling_tflop_per_s: the matmul's. mfu: useful
    over ceiling. phases_ms: medians of the stretches a step consists of. attention_ms: attention alone, forward and
    backward of all layers. first_step_s: with all compilation. peak_gb: allocated on the device, 10⁹ bytes.
    """

    variant: str
    context_tokens: int
    blocks: int
    block_tokens: int
    predictions: int
    steps: int
    step_ms: float
    p25_ms: float
    p75_ms: float
    useful_tflop: dict[str, float]
    tflop_per_s: float
    ceiling_tflop_per_s: float
    mfu: float
    phases_ms: dict[str, float]
    attention_ms: float
    first_step_s: float
    peak_gb: float | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run. ceiling: the square matmul that the rows are held against."""

    machine: dict[str, Any]
    device: str
    dtype: str
    ceiling: str
    target: dict[str, Any]
    draft: dict[str, Any]
    rows: tuple[Row, ...]


def run(
    steps: int = 20,
    context: Sequence[int] = CONTEXTS,
    device: str = "auto",
    target: Mapping[str, Any] | None = None,
    variants: Mapping[str, Variant] | None = None,
) -> Result:
    """Time `steps` optimizer steps for each number of context tokens and each variant.

    target: config.json of the target whose draft it is; Qwen3-30B-A3B on a GPU and a tiny one elsewhere.
    Raises ConfigError for a shape that cannot be.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    if short := [tokens for tokens in context if tokens < 2]:
        raise ConfigError(f"context of {short[0]} tokens: expected at least 2, an anchor and what it predicts")
    known = dict(target or (QWEN3_30B if where.type == "cuda" else TINY))
    ways = variants or {"default": Variant(DFlashConfig(loss_chunk=2048))}
    size, dtype = (8192, torch.bfloat16) if where.type == "cuda" else (256, torch.float32)
    ceilings = [_matmul(size, where, dtype)]
    rows = []
    for name, way in ways.items():
        objective = _objective(known, way, where, dtype)
        for tokens in context:
            rows.append(_row(name, objective, tokens, steps))
            ceilings.append(_matmul(size, where, dtype))
    # One ceiling for all rows: the median over the run, as clocks move with the heat.
    ceiling = statistics.median(ceilings)
    return Result(
        machine=machine(),
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        ceiling=f"{size}³ {str(dtype).removeprefix('torch.')} matmul",
        target=known,
        draft=msgspec.to_builtins(next(iter(ways.values())).config),
        rows=tuple(
            msgspec.structs.replace(row, ceiling_tflop_per_s=round(ceiling, 3), mfu=round(row.tflop_per_s / ceiling, 4))
            for row in rows
        ),
    )


def useful_flops(shape: DraftShape, num_context: int, blocks: Blocks) -> dict[str, float]:
    """Floating point operations of one step, forward and backward, by part; a multiplication and addition are two.

    What the mask hides is not counted, nor what is computed again in a backward, nor gradients nobody needs: of the
    taps and of the head's weights.
    """
    hidden, kv = shape.hidden_size, shape.num_kv_heads * shape.head_dim
    heads = shape.num_heads * shape.head_dim
    rows, layers = len(blocks.tokens), shape.num_layers
    product = 2.0 * hidden * rows
    seen = 0
    for kind in shape.layer_types:
        window = shape.sliding_window if kind == "sliding_attention" else 0
        visible = blocks.layout.anchors[:, None] - blocks.layout.visible_from(window)
        seen += int(np.maximum(visible, 0).sum()) + rows * shape.block_size
    head = 2.0 * len(blocks.rows) * hidden * shape.vocab_size
    return {
        "fc": 2 * 2.0 * num_context * len(shape.taps) * hidden * hidden,
        "context keys and values": 3 * layers * 2.0 * num_context * hidden * 2 * kv,
        "attention projections": 3 * layers * product * (2 * heads + 2 * kv),
        "attention": 3 * 2 * 2.0 * seen * heads,
        "mlp": 3 * layers * 3 * product * shape.intermediate_size,
        "head": head,
        "head's gradient": head,
    }


def render(result: Result) -> Any:
    """A table of the rows, and one of where the time of each goes."""
    from rich.console import Group
    from rich.table import Table

    times = Table(title=f"DFlash training step · {result.device} · {result.dtype}")
    for column in ("variant", "context", "predictions", "step ms", "p25–p75", "TFLOP", "TFLOP/s", "MFU", "peak GB"):
        times.add_column(column, justify="left" if column == "variant" else "right")
    for row in result.rows:
        times.add_row(
            row.variant,
            f"{row.context_tokens:,}",
            f"{row.predictions:,}",
            f"{row.step_ms:.1f}",
            f"{row.p25_ms:.1f}–{row.p75_ms:.1f}",
            f"{sum(row.useful_tflop.values()):.3g}",
            f"{row.tflop_per_s:.3g}",
            f"{row.mfu:.1%}",
            "–" if row.peak_gb is None else f"{row.peak_gb:.1f}",
        )
    phases = Table(title="Milliseconds of a step", caption=f"MFU: useful FLOPs over the {result.ceiling}'s "
                   f"{result.rows[0].ceiling_tflop_per_s:.3g} TFLOP/s, measured in this run")  # fmt: skip
    names = list(result.rows[0].phases_ms)
    for column in ("variant", "context", *names, "attention alone", "first step s"):
        phases.add_column(column, justify="left" if column == "variant" else "right")
    for row in result.rows:
        spent = [f"{row.phases_ms[name]:.1f}" for name in names]
        phases.add_row(
            row.variant, f"{row.context_tokens:,}", *spent, f"{row.attention_ms:.1f}", f"{row.first_step_s:.1f}"
        )
    return Group(times, phases)


class _Clock:
    """Marks in time: CUDA events, read when all is done, or the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def ms(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end) if self._device.type == "cuda" else (end - begin) * 1e3)


def _objective(target: dict[str, Any], way: Variant, device: torch.device, dtype: torch.dtype) -> DFlash:
    contract = TargetContract(
        model="random",
        model_type=target["model_type"],
        hidden_size=target["hidden_size"],
        num_layers=target["num_hidden_layers"],
        vocab_size=target["vocab_size"],
        dtype=str(dtype).removeprefix("torch."),
        weights="0",
    )
    generator = torch.Generator(device).manual_seed(0)
    embedding, head = (
        torch.randn(target["vocab_size"], target["hidden_size"], device=device, dtype=dtype, generator=generator) * 0.02
        for _ in range(2)
    )
    return DFlash(
        way.config, contract, target, embedding, head, target["vocab_size"] - 1, device, dtype, tuning=way.tuning
    )


def _row(name: str, objective: DFlash, num_context: int, steps: int) -> Row:
    shape, device, clock = objective.draft.shape, objective.device, _Clock(objective.device)
    rng = np.random.default_rng(0)
    batch = Batch(
        tokens=rng.integers(0, shape.vocab_size, num_context, dtype=np.int32),
        lengths=np.array([num_context], np.int32),
        loss_mask=np.ones(num_context, np.bool_),
        samples=(0,),
    )
    taps = torch.randn(
        num_context, len(shape.taps), shape.hidden_size, device=device, dtype=objective.embedding.dtype,
        generator=torch.Generator(device).manual_seed(1),
    )  # fmt: skip
    optimizer = make_optimizer(objective.module, TrainConfig())
    halted, marks = torch.zeros((), device=device), []
    # The forward's own stretch, without the inputs before and the head behind it.
    hooks = [
        objective.module.register_forward_pre_hook(lambda *_: marks.append(clock.mark())),
        objective.module.register_forward_hook(lambda *_: marks.append(clock.mark())),
    ]

    def step(number: int) -> list[Any]:
        nonlocal halted
        marks.clear()
        marks.append(clock.mark())
        loss = objective.loss(Delivery(msgspec.structs.replace(batch, epoch=number), taps))
        marks.append(clock.mark())
        loss.sum.backward()  # type: ignore[no-untyped-call]
        marks.append(clock.mark())
        _, halted = apply_gradients(optimizer, loss.weight, loss.sum.detach()[None], TrainConfig().clip, halted)
        marks.append(clock.mark())
        return list(marks)

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        begin = time.perf_counter()
        step(0)
        clock.wait()
        first_s = time.perf_counter() - begin
        taken = [step(number) for number in range(1, WARM_UP + steps)][WARM_UP - 2 :]
        clock.wait()
    finally:
        for hook in hooks:
            hook.remove()
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    whole = [clock.ms(before[-1], after[-1]) for before, after in itertools.pairwise(taken)]
    names = ("inputs", "forward", "head", "backward", "optimizer")
    phases = {
        part: round(statistics.median(clock.ms(marks[i], marks[i + 1]) for marks in taken[1:]), 3)
        for i, part in enumerate(names)
    }
    anchors = sample_anchors(
        batch.loss_mask, batch.lengths, batch.samples, 0, objective.seed, objective.config.num_anchors
    )
    blocks = make_blocks(batch, anchors, shape.block_size, shape.mask_token_id, objective.decay)
    useful = {part: flops / 1e12 for part, flops in useful_flops(shape, num_context, blocks).items()}
    median = statistics.median(whole)
    return Row(
        variant=name,
        context_tokens=num_context,
        blocks=len(blocks.layout.anchors),
        block_tokens=len(blocks.tokens),
        predictions=len(blocks.rows),
        steps=steps,
        step_ms=round(median, 3),
        p25_ms=round(float(np.quantile(whole, 0.25)), 3),
        p75_ms=round(float(np.quantile(whole, 0.75)), 3),
        useful_tflop=useful,
        tflop_per_s=sum(useful.values()) / median * 1e3,
        ceiling_tflop_per_s=0.0,
        mfu=0.0,
        phases_ms=phases,
        attention_ms=round(_attention_ms(objective, blocks, clock), 3),
        first_step_s=round(first_s, 2),
        peak_gb=None if peak is None else round(peak, 2),
    )


def _attention_ms(objective: DFlash, blocks: Blocks, clock: _Clock) -> float:
    """Attention of all layers on random states, forward and backward, its kernels and masks as in the step."""
    shape, device, dtype = objective.draft.shape, objective.device, objective.embedding.dtype
    attend = objective.attention(blocks.layout)
    generator = torch.Generator(device).manual_seed(2)

    def states(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(
            tokens, heads, shape.head_dim, device=device, dtype=dtype, generator=generator, requires_grad=True
        )

    rows, context, kv = len(blocks.tokens), blocks.layout.num_context, shape.num_kv_heads
    query = states(rows, shape.num_heads)
    own, far = (states(rows, kv), states(rows, kv)), (states(context, kv), states(context, kv))
    grad = torch.randn(query.shape, device=device, dtype=dtype, generator=generator)

    def once() -> None:
        torch.autograd.grad(attend(query, own, far, shape.sliding_window), (query, *own, *far), grad)

    return shape.num_layers * _median_ms(once, clock, 5)


def _matmul(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a square matmul of random numbers."""
    generator = torch.Generator(device).manual_seed(3)
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * size**3 / _median_ms(lambda: torch.mm(left, right, out=out), _Clock(device), 20) / 1e9


def _median_ms(action: Callable[[], Any], clock: _Clock, count: int) -> float:
    """Median of `count` runs back to back, after two that do not count."""
    for _ in range(2):
        action()
    marks = [clock.mark()]
    for _ in range(count):
        action()
        marks.append(clock.mark())
    clock.wait()
    return statistics.median(clock.ms(begin, end) for begin, end in itertools.pairwise(marks))
