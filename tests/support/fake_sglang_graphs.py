"""Prefill graphs of a fake SGLang: a forward's tensor operations, recorded and done again in the same memory.

As in a CUDA graph no Python runs in a replay, hooks included, but for the parts that a recording is broken at.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Graph(TorchDispatchMode):
    """What is done while it is entered."""

    current: Graph | None = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.paused:
            self.steps.append((func, args, kwargs or {}, output))
        return output

    def __enter__(self) -> Graph:
        Graph.current = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        Graph.current = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def replay(self, batch: Any) -> None:
        """Do it again. batch: for the parts it is broken at."""
        for action, args, kwargs, output in self.steps:
            again = action(*args, batch) if action.__name__ == "attend" else action(*args, **kwargs)
            for memory, new in zip(_tensors(output), _tensors(again), strict=True):
                if new.data_ptr() != memory.data_ptr():
                    memory.copy_(new)


def _tensors(output: Any) -> list[torch.Tensor]:
    several = output if isinstance(output, (tuple, list)) else (output,)
    return [one for one in several if isinstance(one, torch.Tensor)]


def broken(attend: Callable[..., torch.Tensor], before: torch.Tensor, batch: Any) -> torch.Tensor:
    """Run a layer's attention; in a recording, as a part that runs again with the batch of each replay."""
    graph = Graph.current
    if graph is None:
        return attend(before, batch)
    graph.paused = True
    output = attend(before, batch)
    graph.paused = False
    graph.steps.append((attend, (before,), {}, output))
    return output


class PrefillCudaGraphRunner:
    """A graph for each size, on ids, positions and cache slots of its own, which are padded with zeros."""

    prefill_backend_name = "breakable"

    def __init__(self, runner: Any, sizes: Sequence[int]) -> None:
        self.runner, self.sizes = runner, sorted(sizes)
        self.ids, self.slots, self.positions = torch.zeros(3, self.sizes[-1], dtype=torch.int64)
        self.graphs: dict[int, tuple[Graph, Any]] = {}
        self.replayed: list[int] = []
        for size in reversed(self.sizes):
            batch = types.SimpleNamespace(
                input_ids=self.ids[:size], positions=self.positions[:size], out_cache_loc=self.slots[:size],
                plan=self.slots[:size], req_pool_indices=torch.zeros(0, dtype=torch.int64),
                extend_start_loc=torch.zeros(0, dtype=torch.int64), extend_seq_lens_cpu=[], residual_stream=None,
            )  # fmt: skip
            with torch.no_grad():
                for _ in range(2):  # it warms up
                    runner.model.model(batch)
                with Graph() as graph:
                    output = runner.model.model(batch)
            self.graphs[size] = graph, output

    def can_run_graph(self, batch: Any) -> bool:
        tokens = len(batch.input_ids)
        return tokens <= self.sizes[-1] and self._padded(tokens) <= 2 * tokens

    def execute(self, batch: Any) -> Any:
        tokens = len(batch.input_ids)
        size = self._padded(tokens)
        for memory, given in (
            (self.ids, batch.input_ids), (self.positions, batch.positions), (self.slots, batch.out_cache_loc)
        ):  # fmt: skip
            memory[:size] = 0
            memory[:tokens] = given
        graph, (hidden, _) = self.graphs[size]
        graph.replay(batch)
        self.replayed.append(size)
        return self.runner.model.logits_processor(self.ids[:size], hidden, None, batch)

    def _padded(self, tokens: int) -> int:
        return next(size for size in self.sizes if size >= tokens)
