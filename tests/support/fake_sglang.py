"""What specd touches of SGLang, with a tiny decoder behind it: enough to run the backend where SGLang is not installed.

Its layers return (hidden, residual) as SGLang's do, and attend causally within each sequence through the KV cache's
slots and the request table, so that wrong positions, slots or lengths change the states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from typing import Any

import pytest
import torch

from specd.targets.sglang.touch_points import TOUCH_POINTS

HIDDEN, VOCAB, LAYERS = 64, 256, 5


class Layer(torch.nn.Module):
    """Mixes each token with the mean of what its sequence's slots hold up to it; then SGLang's residual convention."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.runner = (runner,)
        self.calls = 0

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None, batch: ForwardBatch) -> Any:
        self.calls += 1
        residual = hidden if residual is None else hidden + residual
        runner = self.runner[0]
        runner.cache[batch.out_cache_loc] = residual
        mixed = torch.empty_like(residual)
        for row, start, length in zip(
            batch.req_pool_indices.tolist(), batch.extend_start_loc.tolist(), batch.extend_seq_lens_cpu, strict=True
        ):
            seen = runner.cache[runner.req_to_token_pool.req_to_token[row, :length].long()]
            mixed[start : start + length] = seen.cumsum(0) / (batch.positions[start : start + length, None] + 1)
        return self.output(torch.tanh(self.mix(mixed)), residual)

    def output(self, hidden: torch.Tensor, residual: torch.Tensor) -> Any:
        return hidden, residual


class Norm(torch.nn.Module):
    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        whole = hidden if residual is None else hidden + residual
        normed = whole / whole.square().mean(-1, keepdim=True).sqrt()
        return normed if residual is None else (normed, residual)


class LogitsProcessor(torch.nn.Module):
    def forward(self, *_: Any) -> None:
        raise AssertionError("lm_head must not run")


class Decoder(torch.nn.Module):
    def __init__(self, runner: ModelRunner, layer: type[Layer]) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(VOCAB, HIDDEN)
        self.layers = torch.nn.ModuleList(layer(runner) for _ in range(LAYERS))
        self.norm = Norm()


class Model(torch.nn.Module):
    def __init__(self, runner: ModelRunner, layer: type[Layer]) -> None:
        super().__init__()
        self.model = Decoder(runner, layer)
        self.lm_head = torch.nn.Linear(HIDDEN, VOCAB + 64, bias=False)  # padded, as SGLang's are
        self.logits_processor = LogitsProcessor()

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.model.embed_tokens

    def forward(self, batch: ForwardBatch) -> Any:
        hidden, residual = self.model.embed_tokens(batch.input_ids), None
        for layer in self.model.layers:
            output = layer(hidden, residual, batch)
            hidden, residual = output[:2] if isinstance(output, tuple) else (output, None)
        normed = self.model.norm(hidden, residual)
        return self.logits_processor(batch.input_ids, normed[0] if isinstance(normed, tuple) else normed, None, batch)


class ServerArgs:
    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


class ModelRunner:
    """What tests set: the kind of layer, and what a forward raises."""

    layer: type[Layer] = Layer
    fail: Exception | None = None

    def __init__(self, *, server_args: ServerArgs, **_: Any) -> None:
        self.args = server_args
        self.dtype = torch.float32
        text = types.SimpleNamespace(hidden_size=HIDDEN, num_hidden_layers=LAYERS, vocab_size=VOCAB)
        self.model_config = types.SimpleNamespace(hf_text_config=text)
        torch.manual_seed(0)
        self.model = Model(self, type(self).layer)

    def alloc_memory_pool(self) -> None:
        args: Any = self.args
        self.page_size, self.max_total_num_tokens = args.page_size, args.max_total_tokens
        self.max_running_requests = args.max_running_requests
        table = torch.zeros(self.max_running_requests + 1, args.context_length, dtype=torch.int32)
        self.req_to_token_pool = types.SimpleNamespace(req_to_token=table)
        self.cache = torch.full((self.max_total_num_tokens + 1, HIDDEN), torch.nan)

    def init_attention_backends(self) -> None: ...

    def init_cuda_graphs(self) -> None: ...

    def forward(self, batch: ForwardBatch) -> Any:
        if (failure := type(self).fail) is not None:
            raise failure
        return self.model(batch)


@dataclasses.dataclass
class ForwardBatch:
    forward_mode: Any
    batch_size: int
    input_ids: torch.Tensor
    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    out_cache_loc: torch.Tensor
    seq_lens_sum: int
    orig_seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor
    positions: torch.Tensor
    extend_num_tokens: int
    extend_seq_lens: torch.Tensor
    extend_prefix_lens: torch.Tensor
    extend_start_loc: torch.Tensor
    extend_prefix_lens_cpu: list[int]
    extend_seq_lens_cpu: list[int]
    extend_logprob_start_lens_cpu: list[int]
    spec_algorithm: Any
    capture_hidden_mode: Any
    num_token_non_padded_cpu: int
    is_extend_in_batch: bool
    lora_ids: list[None]
    rids: list[str]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package `sglang` 0.5.14 of these pieces in place; symbols that are only called get a function."""
    monkeypatch.setattr(ModelRunner, "layer", Layer)
    monkeypatch.setattr(ModelRunner, "fail", None)
    package: Any = types.ModuleType("sglang")
    package.__version__ = "0.5.14"
    monkeypatch.setitem(sys.modules, "sglang", package)
    pieces = {piece.__name__: piece for piece in (ServerArgs, ModelRunner, ForwardBatch, LogitsProcessor)}
    for touch in TOUCH_POINTS:
        if touch.module not in sys.modules:
            for depth in range(2, touch.module.count(".") + 2):
                name = ".".join(touch.module.split(".")[:depth])
                with contextlib.suppress(KeyError):
                    _ = sys.modules[name]
                    continue
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        found: Any = pieces.get(touch.symbol)
        if found is None and touch.symbol[0].islower():
            found = lambda server_args=None: None  # noqa: E731
        elif found is None:
            found = type(touch.symbol, (), {})
        for name in touch.names:
            if touch.symbol in ("ServerArgs", "ModelRunner") and not hasattr(found, name):
                monkeypatch.setattr(found, name, None, raising=False)
            elif touch.symbol not in pieces and touch.symbol[0].isupper():
                setattr(found, name, staticmethod(lambda args=None: None))
        monkeypatch.setattr(sys.modules[touch.module], touch.symbol, found, raising=False)
