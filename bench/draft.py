"""How long does a training step of a draft take, and what share of the device's matmul rate does it use?

The states are random and already on the device: this is the trainer alone. Every step is of another epoch, so that a
draft that draws from its samples draws anew, as in training.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import torch

from specd.bench.device_clock import DeviceClock, matmul_tflop_per_s, median_ms
from specd.bench.machine import machine
from specd.bench.made_up import MadeUp, made_up
from specd.config.settings import Config, TrainConfig
from specd.drafts import registry
from specd.drafts.base import Method, Objective, TargetParts, Tuning
from specd.errors import ConfigError
from specd.protocol.batch import Batch, Delivery
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract
from specd.train.optimizer import apply_gradients, make_optimizer

CONTEXTS: Final = (1024, 3072, 10240)
DEFAULTS: Final = {"loss_chunk": 2048}
"""Settings of the one variant where none is given, as far as the method has them."""
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
"""The target on a machine without a GPU: small enough for a core."""


class Variant(NamedTuple):
    """A draft's settings, as they stand in a run's `draft` section, and how its step is computed."""

    settings: dict[str, Any]
    tuning: Tuning = Tuning()


class DraftRow(msgspec.Struct, frozen=True, kw_only=True):
    """One context length and variant. Times are of whole optimizer steps, back to back, by the device's clock.

    rows: tokens that run through the draft's layers; predictions: those of them that the head is asked for.
    useful_tflop: of one step, by part, without anything computed twice. ceiling_tflop_per_s: the matmul's. mfu: useful
    over ceiling. phases_ms: medians of the stretches a step consists of. parts_ms: of parts of a step that were run
    alone, forward and backward of all layers. first_step_s: with all compilation. peak_gb: allocated on the device,
    10⁹ bytes.
    """

    variant: str
    context_tokens: int
    rows: int
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
    parts_ms: dict[str, float]
    first_step_s: float
    peak_gb: float | None


class DraftResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run. method: the draft, by title. ceiling: the square matmul that the rows are held against."""

    machine: dict[str, Any]
    method: str
    device: str
    dtype: str
    ceiling: str
    target: dict[str, Any]
    draft: dict[str, Any]
    rows: tuple[DraftRow, ...]


def run(
    steps: int = 20,
    context: Sequence[int] = CONTEXTS,
    device: str = "auto",
    target: Mapping[str, Any] | None = None,
    variants: Mapping[str, Variant] | None = None,
    name: str = registry.DEFAULT,
) -> DraftResult:
    """Time `steps` optimizer steps for each number of context tokens and each variant.

    target: config.json of the target whose draft it is; Qwen3-30B-A3B on a GPU and a tiny one elsewhere. name: of the
    draft's method. Raises ConfigError for a method, settings or a shape that cannot be.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where, method = torch.device(device), registry.load(name)
    if short := [tokens for tokens in context if tokens < method.consecutive_labels]:
        least = method.consecutive_labels
        raise ConfigError(f"context of {short[0]} tokens: expected at least {least}, which {name} needs to predict one")
    known = dict(target or (QWEN3_30B if where.type == "cuda" else TINY))
    ways = variants or {"default": Variant(defaults_of(name))}
    size, dtype = (8192, torch.bfloat16) if where.type == "cuda" else (256, torch.float32)
    ceilings = [matmul_tflop_per_s(size, where, dtype)]
    rows = []
    for variant, way in ways.items():
        trained = _Trained.made(name, known, way, where, dtype)
        for tokens in context:
            rows.append(_row(variant, trained, tokens, steps))
            ceilings.append(matmul_tflop_per_s(size, where, dtype))
    # One ceiling for all rows: the median over the run, as clocks move with the heat.
    ceiling = statistics.median(ceilings)
    return DraftResult(
        machine=machine(),
        method=method.title,
        device=torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        ceiling=f"{size}³ {str(dtype).removeprefix('torch.')} matmul",
        target=known,
        draft=msgspec.to_builtins(_settings(name, known, next(iter(ways.values())))),
        rows=tuple(
            msgspec.structs.replace(row, ceiling_tflop_per_s=round(ceiling, 3), mfu=round(row.tflop_per_s / ceiling, 4))
            for row in rows
        ),
    )


def defaults_of(name: str) -> dict[str, Any]:
    """Settings of a method's draft that the benchmark changes where they are not given."""
    own = registry.load(name).settings.__struct_fields__
    return {key: value for key, value in DEFAULTS.items() if key in own}


def render(result: DraftResult) -> Any:
    """A table of the rows, and one of where the time of each goes."""
    from rich.console import Group
    from rich.table import Table

    def table(*columns: str) -> Table:
        """Without a frame: readable at 80 columns."""
        made = Table(box=None, padding=(0, 1, 0, 0))
        for column in columns:
            made.add_column(column, justify="left" if column == "variant" else "right")
        return made

    times = table("variant", "context", "predictions", "step ms", "p25–p75", "TFLOP", "TFLOP/s", "MFU", "peak GB")
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
    names, parts = list(result.rows[0].phases_ms), list(result.rows[0].parts_ms)
    phases = table("variant", "context", *names, *(f"{part} alone" for part in parts), "first step s")
    for row in result.rows:
        spent = [*(row.phases_ms[name] for name in names), *(row.parts_ms[part] for part in parts), row.first_step_s]
        phases.add_row(row.variant, f"{row.context_tokens:,}", *(f"{value:.1f}" for value in spent))
    ceiling = f"{result.ceiling}'s {result.rows[0].ceiling_tflop_per_s:.3g} TFLOP/s"
    return Group(
        f"A training step of {result.method} · {result.device} · {result.dtype}",
        times,
        "\nMilliseconds of a step",
        phases,
        f"\nMFU: useful FLOPs over the {ceiling}, measured in this run",
    )


class _Trained(NamedTuple):
    """A draft beside a target of random weights. spec: what it would have captured."""

    method: type[Method]
    objective: Objective
    spec: CaptureSpec
    hidden: int
    vocab: int
    device: torch.device

    @classmethod
    def made(
        cls, name: str, target: dict[str, Any], way: Variant, device: torch.device, dtype: torch.dtype
    ) -> _Trained:
        contract = TargetContract(
            model="random",
            model_type=target["model_type"],
            hidden_size=target["hidden_size"],
            num_layers=target["num_hidden_layers"],
            vocab_size=target["vocab_size"],
            dtype=str(dtype).removeprefix("torch."),
            weights="0",
        )
        generator, size = torch.Generator(device).manual_seed(0), (contract.vocab_size, contract.hidden_size)
        embedding, head = (torch.randn(size, device=device, dtype=dtype, generator=generator) * 0.02 for _ in range(2))
        method, settings = registry.load(name), _settings(name, target, way)
        # As frequent as words are: the n-th at 1 / n.
        counts = 10**9 // np.arange(1, contract.vocab_size + 1)
        target_parts = TargetParts(contract, target, embedding, head, counts)
        objective = method.objective(settings, target_parts, device, dtype, tuning=way.tuning)
        spec = method.capture(settings, contract)
        return cls(method, objective, spec, contract.hidden_size, contract.vocab_size, device)

    def states(self, tokens: int) -> MadeUp:
        """Random ones of so many tokens, as far as the draft wants them."""
        return made_up(self.spec, tokens, self.hidden, self.device)


def _settings(name: str, target: dict[str, Any], way: Variant) -> Config:
    """A draft's settings, with the target's last token as the mask token if it takes one."""
    given = way.settings
    if "mask_token_id" in registry.load(name).settings.__struct_fields__:
        given = {"mask_token_id": target["vocab_size"] - 1} | given
    return registry.settings(name, given, "specd bench draft")


def _row(variant: str, trained: _Trained, num_context: int, steps: int) -> DraftRow:
    objective, device, clock = trained.objective, trained.device, DeviceClock(trained.device)
    batch = Batch(
        tokens=np.random.default_rng(0).integers(0, trained.vocab, num_context, dtype=np.int32),
        lengths=np.array([num_context], np.int32),
        loss_mask=np.ones(num_context, np.bool_),
        samples=(0,),
    )
    states = trained.states(num_context)
    optimizer = make_optimizer(objective.module, TrainConfig())
    halted, marks = torch.zeros((), device=device), []
    # The forward's own stretch, without the inputs before and the head behind it; if the module is called as a whole.
    hooks = [
        objective.module.register_forward_pre_hook(lambda *_: marks.append(clock.mark())),
        objective.module.register_forward_hook(lambda *_: marks.append(clock.mark())),
    ]

    def step(number: int) -> list[Any]:
        nonlocal halted
        marks.clear()
        marks.append(clock.mark())
        loss = objective.loss(Delivery(msgspec.structs.replace(batch, epoch=number), *states))
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
    loss = ("inputs", "forward", "head") if len(taken[0]) == 6 else ("loss",)
    phases = {
        part: round(statistics.median(clock.ms(marks[i], marks[i + 1]) for marks in taken[1:]), 3)
        for i, part in enumerate((*loss, "backward", "optimizer"))
    }
    work = trained.method.workload(objective, batch)
    useful = {part: flops / 1e12 for part, flops in work.flops.items()}
    median = statistics.median(whole)
    return DraftRow(
        variant=variant,
        context_tokens=num_context,
        rows=work.rows,
        predictions=work.predictions,
        steps=steps,
        step_ms=round(median, 3),
        p25_ms=round(float(np.quantile(whole, 0.25)), 3),
        p75_ms=round(float(np.quantile(whole, 0.75)), 3),
        useful_tflop=useful,
        tflop_per_s=sum(useful.values()) / median * 1e3,
        ceiling_tflop_per_s=0.0,
        mfu=0.0,
        phases_ms=phases,
        parts_ms={part: round(median_ms(alone, clock, 5), 3) for part, alone in work.parts.items()},
        first_step_s=round(first_s, 2),
        peak_gb=None if peak is None else round(peak, 2),
    )
