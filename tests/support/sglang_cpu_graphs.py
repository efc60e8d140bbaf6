"""SGLang's prefill graphs on the CPU: its own runner, whose CUDA graphs are recordings of tensor operations instead.

What is real: the buckets, the memory that a batch is copied to, the breaks at attention, the eager tail, and how SGLang
chooses a replay. Models that decide in Python by their tensors, as mixtures of experts do there, cannot be recorded.
"""

from __future__ import annotations

import contextlib
import importlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fake_sglang_graphs import Graph

_SRT = "sglang.srt."
_RUNNER = _SRT + "model_executor."


class Recording:
    """Graphs with the parts between them that run again; SGLang's wrapper of those parts calls it."""

    _barrier_fn = None

    def __init__(self) -> None:
        self.graphs: list[Graph] = []
        self.cuda_graph = types.SimpleNamespace(_break_fns=[])
        self._begin_new_segment()

    def _begin_new_segment(self) -> None:
        self.graphs.append(Graph())
        self.graphs[-1].__enter__()

    def _end_current_segment(self) -> None:
        self.graphs[-1].__exit__(None, None, None)

    def replay(self) -> None:
        """Do all of it again."""
        for number, graph in enumerate(self.graphs):
            graph.replay(None)
            if number < len(self.cuda_graph._break_fns):
                self.cuda_graph._break_fns[number]()


def install(sizes: Sequence[int]) -> None:
    """Patch the installed SGLang, of 0.5.17 or newer, for this process. sizes: the buckets."""
    prefill = importlib.import_module(_RUNNER + "runner.prefill_cuda_graph_runner")
    breaks = importlib.import_module(_RUNNER + "runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph")
    setup = importlib.import_module(_RUNNER + "model_runner_components.cuda_graph_setup")
    attention = importlib.import_module(_SRT + "layers.radix_attention")
    breakable = importlib.import_module(_RUNNER + "runner_backend.breakable_cuda_graph_backend")

    class Backend(breakable.BreakableCudaGraphBackend):  # type: ignore[misc, name-defined]
        def __init__(self, runner: Any) -> None:
            self._cuda_graph_runner = runner
            self._graphs: dict[Any, Recording] = {}
            self._outputs: dict[Any, Any] = {}
            self._buffer: Any = None

        @contextlib.contextmanager
        def capture_session(self, stream: Any) -> Iterator[None]:
            with self.replay_session():
                yield

        def capture_one(self, shape_key: Any, forward_fn: Callable[[], Any], **_: Any) -> None:
            forward_fn()  # it warms up
            warm = forward_fn()
            if self._buffer is None:
                self._buffer = self._alloc_full_buffer(warm, shape_key.size)
            recording = Recording()
            token = breaks._current_capture_var.set(recording)
            output = forward_fn()
            self._copy_output_to_buffer(output, self._buffer, shape_key.size)
            recording._end_current_segment()
            breaks._current_capture_var.reset(token)
            self._graphs[shape_key] = recording
            self._outputs[shape_key] = self._slice_output(self._buffer, shape_key.size)

    def attend(*args: Any, use_mha_companion: bool = False, **kwargs: Any) -> None:
        """SGLang's own, of which only a CUDA kernel is registered with torch."""
        attention._unified_attention_with_output_impl(*args, use_mha_companion, False, **kwargs)

    @contextlib.contextmanager
    def no_stream(**_: Any) -> Iterator[Any]:
        yield types.SimpleNamespace(stream=None)

    record = setup.capture_prefill_graph

    def record_here(*, model_runner: Any, **given: Any) -> Any:
        context = importlib.import_module(_SRT + "runtime_context")
        published = context.get_exec().graph.cuda_graph_config.prefill
        published.backend, published.bs = "breakable", list(sizes)  # SGLang turns them off on a CPU
        return record(model_runner=model_runner, **given)

    replaced: tuple[tuple[Any, str, Any], ...] = (
        (prefill, "resolve_prefill_backend", Backend),
        (prefill, "graph_capture", no_stream),
        (prefill, "get_or_create_global_graph_capture_stream", lambda *_, **__: None),
        (breaks, "_weak_ref_if_tensor", lambda tensor: tensor),
        (attention, "breakable_unified_attention_with_output", breaks.eager_on_graph(True)(attend)),
        (setup, "check_cuda_graph_backend", lambda phase, backend: (phase, backend) == ("decode", "disabled")),
        (setup, "capture_prefill_graph", record_here),
    )
    for module, name, other in replaced:
        setattr(module, name, other)
