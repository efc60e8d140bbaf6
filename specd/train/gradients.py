"""Gradients that are summed over all ranks while the backward pass still runs.

Every rank sums the same buckets in the same order, whatever its own backward pass reaches and when: a rank that had no
batch, or one without a prediction, adds zeros. Sums, not means: the optimizer divides once, by the weight of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

BUCKET_BYTES: Final = 32 << 20
"""Tensors are sent together up to this size: of small ones each would wait for the one before."""


class Gradients:
    """The gradients of some parameters, to be summed once for every optimizer step.

    reduce: starts the sum of some tensors, in place, and returns what to wait for; None for one rank alone.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], reduce: Callable[[list[torch.Tensor]], Any] | None
    ) -> None:
        self._reduce = reduce
        self._buckets = _buckets(parameters)
        self._of = {parameter: number for number, bucket in enumerate(self._buckets) for parameter in bucket}
        self._armed = False
        self._left: list[int] = []
        self._sent = 0
        self._works: list[Any] = []
        if reduce is not None:
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]

    def last(self) -> None:
        """The next backward pass is the last one of this step on this rank: send what is complete as it goes on."""
        if self._reduce is not None:
            self._armed, self._sent, self._works = True, 0, []
            self._left = [len(bucket) for bucket in self._buckets]

    def works(self) -> list[Any]:
        """After the last backward pass, or without one: send the rest; everything to wait for."""
        if self._reduce is None:
            return []
        if not self._armed:
            self.last()
        self._armed = False
        for bucket in self._buckets[self._sent :]:
            self._send(bucket)
        return self._works

    def _ready(self, parameter: torch.Tensor) -> None:
        if not self._armed:
            return
        self._left[self._of[parameter]] -= 1  # type: ignore[index]
        while self._sent < len(self._buckets) and not self._left[self._sent]:
            self._send(self._buckets[self._sent])

    def _send(self, bucket: list[torch.nn.Parameter]) -> None:
        assert self._reduce is not None
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._sent += 1
        self._works.append(self._reduce([parameter.grad for parameter in bucket if parameter.grad is not None]))


def exchanged(tensors: list[torch.Tensor], exchange: Callable[[torch.Tensor], Any]) -> Any:
    """Start one exchange of tensors of one dtype, in place; returns what to wait for. exchange: starts that of one."""
    return exchange(tensors[0]) if len(tensors) == 1 else _Packed(tensors, exchange)


class _Packed:
    """An exchange of several tensors as one, which they are given the values of when it is over.

    Not torch's own coalesced one: over nccl a peer that is lost while it is being started ends the process there, as
    its C++ throws a second time while it unwinds (seen with torch 2.11).
    """

    def __init__(self, tensors: list[torch.Tensor], exchange: Callable[[torch.Tensor], Any]) -> None:
        self._tensors = tensors
        self._flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._work = exchange(self._flat)

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self) -> None:
        """On the host over gloo, on the current stream over nccl."""
        self._work.wait()
        parts = torch.split(self._flat, [tensor.numel() for tensor in self._tensors])
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            self._tensors, [part.view_as(into) for part, into in zip(parts, self._tensors, strict=True)]
        )


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Parameters in the order in which a backward pass completes them, about: from the last to the first."""
    found: list[list[torch.nn.Parameter]] = []
    size = 0
    for parameter in reversed(parameters):
        nbytes = parameter.numel() * parameter.element_size()
        if not found or size + nbytes > BUCKET_BYTES or found[-1][0].dtype != parameter.dtype:
            found.append([])
            size = 0
        found[-1].append(parameter)
        size += nbytes
    return found
