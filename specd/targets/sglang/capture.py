"""Where the states of one forward go, and the hooks that write them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from specd.errors import TargetError
from specd.memory.fp8 import Rows, write_sum
from specd.protocol.payload import Payload
from specd.targets.sglang.graphs import Source
from specd.targets.sglang.versions import layer_output


class AllCaptured(BaseException):
    """Ends a forward once all is captured; the engine takes it. Not an Exception: SGLang logs each of a replay."""


Sink = list[tuple[int, int, torch.Tensor | Rows]]
"""Where rows [start, end) of a forward's states go: [end − start, H] each."""


class Capture(msgspec.Struct, frozen=True, kw_only=True):
    """Where a forward's states go. taps: by layer. final: empty if not captured. brought: by each sequence, or ()."""

    taps: dict[int, Sink]
    final: Sink
    brought: Sequence[Payload] = ()

    def rows(self, start: int, end: int, brought: Sequence[Payload] = ()) -> Capture:
        """The part of rows [start, end), for a forward of these alone."""
        return Capture(
            taps={tap: _within(sink, start, end) for tap, sink in self.taps.items()},
            final=_within(self.final, start, end),
            brought=brought,
        )


def _within(sink: Sink, start: int, end: int) -> Sink:
    return [
        (max(low, start) - start, min(high, end) - start, out[max(start - low, 0) : end - low])
        for low, high, out in sink
        if low < end and high > start
    ]


def layer_hook(sink: Sink, num_tokens: int, hidden_alone: bool) -> Callable[..., Any]:
    """A layer's forward hook, which writes its output. hidden_alone: its residual is no part of the stream."""

    def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden, residual, returned = layer_output(args, kwargs, output)
        if not isinstance(hidden, torch.Tensor) or hidden.ndim != 2 or hidden.shape[0] != num_tokens:
            raise TargetError(
                "SGLang's layers return neither (hidden, residual) nor hidden; use --backend transformers"
            )
        for start, end, out in sink:
            if residual is None or hidden_alone:
                out.copy_(hidden[start:end])
            else:
                write_sum(out, hidden[start:end], residual[start:end])
        return returned

    return hook


def head_hook(capture: Capture, source: Source | None) -> Callable[..., None]:
    """The pre-hook of the logits_processor, which ends the forward. source: of the taps, None if layers' hooks are."""

    def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(args) < 2 or not isinstance(args[1], torch.Tensor):
            raise TargetError("SGLang's logits_processor got no (input_ids, hidden, …); use --backend transformers")
        for start, end, out in capture.final:
            out.copy_(args[1][start:end])
        if source is not None:
            for tap, states in zip(sorted(capture.taps), source.states(args, kwargs), strict=True):
                for start, end, out in capture.taps[tap]:
                    out.copy_(states[start:end])
        raise AllCaptured

    return hook
