"""A target in a process of its own, without a daemon: it times the forwards that it is asked for.

Run as a module it takes JSON lines on standard input, a BareJob first and then BareAsks, and answers each with a line.
It ends with its input.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from specd.bench.pipeline.bare_target import run
from specd.bench.pipeline.processes import answers
from specd.bench.pipeline.settings import Settings, short_batches
from specd.bench.target.profile import profile
from specd.bench.target.result import Kernel
from specd.errors import SpecdError
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec
from specd.targets.base import Target


class BareJob(msgspec.Struct, frozen=True, kw_only=True):
    """Which target to load."""

    settings: Settings


class BareAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`forwards` timed forwards after `warmup` others, each over `share` samples of `tokens` tokens.

    nonce: another one gives other tokens. profiled: one more forward, under the profiler.
    """

    tokens: int
    share: int
    forwards: int
    warmup: int = 2
    nonce: int = 0
    profiled: bool = False


class BareAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """Of a loaded target, or of one ask. seconds: of each forward. error: why there are none."""

    seconds: tuple[float, ...] = ()
    target: dict[str, Any] = {}
    busy_ms: float = 0.0
    launches: dict[str, int] = {}
    kernels: tuple[Kernel, ...] = ()
    error: str = ""

    @property
    def forward_ms(self) -> float:
        """The median."""
        return round(statistics.median(self.seconds) * 1e3, 3)


def groups(settings: Settings, ask: BareAsk, vocab: int, count: int) -> list[Sequence[Batch]]:
    """`count` forwards of random tokens, each its batches."""
    sized = msgspec.structs.replace(settings, short=ask.tokens)
    drawn = short_batches(sized, vocab, 1, count * ask.share, ask.nonce)
    return [drawn[at : at + ask.share] for at in range(0, len(drawn), ask.share)]


def measure(target: Target, spec: CaptureSpec, settings: Settings, ask: BareAsk) -> BareAnswer:
    """Answer one ask."""
    drawn = groups(settings, ask, target.contract.vocab_size, ask.warmup + ask.forwards)
    answer = BareAnswer(seconds=tuple(run(target, spec, drawn, ask.warmup)))
    if not ask.profiled:
        return answer
    busy_ms, launches, kernels = profile(lambda: run(target, spec, drawn[:1], 0), target.device)
    return msgspec.structs.replace(answer, busy_ms=busy_ms, launches=launches, kernels=kernels)


def serve(settings: Settings, lines: Any, answer: Callable[[msgspec.Struct], None]) -> None:
    """Load the target, say what it is, then answer every line."""
    from specd.targets.registry import load_target

    target = load_target(settings.daemon(settings.devices[0], 2).target)
    if target.device.startswith("cuda"):
        torch.cuda.set_device(target.device)
    contract = target.contract
    spec = settings.capture(contract)
    answer(
        BareAnswer(
            target={
                "model": contract.model,
                "layers": contract.num_layers,
                "hidden": contract.hidden_size,
                "vocab": contract.vocab_size,
                "taps": spec.taps,
                "final": spec.final,
                "dtype": spec.dtype,
            }
        )
    )
    for line in lines:
        try:
            answer(measure(target, spec, settings, msgspec.json.decode(line, type=BareAsk)))
        except (SpecdError, RuntimeError) as error:  # torch's: of the profiler, or of a device
            answer(BareAnswer(error=str(error)))


def main() -> None:
    """Entry of the process."""
    job = msgspec.json.decode(sys.stdin.readline(), type=BareJob)
    if job.settings.devices[0] == "cpu":
        torch.set_num_threads(1)
    with answers() as answer:
        try:
            serve(job.settings, sys.stdin, answer)
        except SpecdError as error:
            answer(BareAnswer(error=str(error)))


if __name__ == "__main__":
    main()
