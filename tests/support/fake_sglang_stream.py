"""The residual stream of a fake SGLang from 0.5.22 on: a layer's output may still lack its all-reduce."""

from __future__ import annotations

from typing import Any

import torch


class Addition:
    """How a layer's output joins the stream."""

    is_plain_add = True


class Gated(Addition):
    """Another way."""

    is_plain_add = False


class Unfinished:
    """What a layer returns whose all-reduce is to do: no tensor."""


class Contribution:
    def __init__(self, value: torch.Tensor, update: Addition, handle: Unfinished) -> None:
        self.value, self.update, self.handle = value, update, handle
        self.finished = False


class ResidualStream:
    """Every output is halved until it is complete, as if another rank had the other half."""

    __slots__ = ("pending", "residual")

    def __init__(self) -> None:
        self.residual: torch.Tensor | None = None
        self.pending: Contribution | None = None

    def record(self, output: torch.Tensor, update: Addition) -> Unfinished:
        assert self.pending is None
        self.pending = Contribution(output / 2, update, Unfinished())
        return self.pending.handle

    def complete(self, given: Any) -> torch.Tensor:
        """The layer's whole output; from now on the stream knows this, not what the layer returned."""
        self._check(given)
        if self.pending is None:
            whole: torch.Tensor = given
            return whole
        if not self.pending.finished:
            self.pending.value, self.pending.finished = self.pending.value * 2, True
        return self.pending.value

    def prepare(self, given: Any) -> torch.Tensor:
        """The stream before the next layer, which is its input."""
        whole = self.complete(given)
        self.residual = whole if self.residual is None else self.residual + whole
        self.pending = None
        return self.residual

    def snapshot(self, given: Any) -> torch.Tensor:
        """The stream before the next layer; nothing changes."""
        self._check(given)
        if self.pending is None:
            whole: torch.Tensor = given
            return whole.clone()
        assert self.residual is not None
        return self.residual + self.pending.value * (1 if self.pending.finished else 2)

    def _check(self, given: Any) -> None:
        pending = self.pending
        if pending is not None and given is not (pending.value if pending.finished else pending.handle):
            raise RuntimeError("this output does not belong to the stream")
