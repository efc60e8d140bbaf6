"""What specd touches of SGLang, with a tiny decoder behind it: enough to run the backend where SGLang is not installed.

Its layers return (hidden, residual) as SGLang's do, or as from 0.5.22 on leave the residual in the batch's stream. They
attend causally within each sequence through the KV cache's slots and the request table, so that wrong positions, slots
or lengths change the states.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from typing import Any

import pytest
import torch

from fake_sglang_graphs import PrefillCudaGraphRunner, broken
from fake_sglang_recurrent import STATE_BYTES, Memory, Pool
from fake_sglang_stream import Addition, ResidualStream
from specd.targets.sglang.touch_points import TOUCH_POINTS
from specd.targets.sglang.versions import OVERRIDDEN, PUBLISHED, WRAPPED, Version, version_of

HIDDEN, VOCAB, LAYERS = 64, 256, 5
VERSIONS = ("0.5.14", "0.5.17", "0.5.23")
"""One of each form."""


class Process:
    """What SGLang keeps for the whole process."""

    version: Version = (0, 5, 14)
    published: Any = None
    groups: list[str] = []  # noqa: RUF012  # replaced by install
    states: int | None = None
    joined = False


def destroy_model_parallel() -> None:
    Process.joined = False


class Layer(torch.nn.Module):
    """Mixes each token with the mean of what its sequence's slots hold up to it; then SGLang's residual convention."""

    update: Any = Addition()
    memory: Memory | None = None

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.runner = (runner,)
        self.calls = 0

    def forward(self, hidden: Any, residual: torch.Tensor | None, *, batch: Any) -> Any:
        self.calls += 1
        stream = batch.residual_stream if Process.version >= PUBLISHED else None
        before: torch.Tensor
        if stream is not None:
            before = stream.prepare(hidden)
        else:
            before = hidden if residual is None else hidden + residual
        added = torch.tanh(self.mix(broken(self.attend, before, batch)))
        return self.output(added, before) if stream is None else stream.record(added, self.update)

    def attend(self, before: torch.Tensor, batch: Any) -> torch.Tensor:
        """Rows behind the batch's own hold no numbers, as those of a padded batch may."""
        runner = self.runner[0]
        slots = batch.out_cache_loc if Process.version < PUBLISHED else batch.plan
        runner.cache[slots] = before[: len(slots)]
        mixed = torch.full_like(before, torch.nan)
        for row, start, length in zip(
            batch.req_pool_indices.tolist(), batch.extend_start_loc.tolist(), batch.extend_seq_lens_cpu, strict=True
        ):
            seen = runner.cache[runner.req_to_token_pool.req_to_token[row, :length].long()]
            sums = seen.cumsum(0) if self.memory is None else self.memory.summed(row, seen)
            mixed[start : start + length] = sums / (batch.positions[start : start + length, None] + 1)
        return mixed

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

    def forward(self, batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What lm_head reads, and the captured layers: what SGLang records as a graph."""
        if Process.version >= PUBLISHED:
            batch.residual_stream = ResidualStream()
        hidden, residual, aux = self.embed_tokens(batch.input_ids), None, []
        for layer in self.layers:
            if getattr(layer, "_is_layer_to_capture", False):
                aux.append(hidden + residual if residual is not None else batch.residual_stream.snapshot(hidden))
            output = layer(hidden, residual, batch=batch)
            hidden, residual = output[:2] if isinstance(output, tuple) else (output, None)
        if Process.version >= PUBLISHED:
            hidden = batch.residual_stream.prepare(hidden)
        normed = self.norm(hidden, residual)
        return normed[0] if isinstance(normed, tuple) else normed, aux


class Model(torch.nn.Module):
    """off_by: what its own capture of layers is wrong by, in layers."""

    off_by = 0

    def __init__(self, runner: ModelRunner, layer: type[Layer]) -> None:
        super().__init__()
        self.model = Decoder(runner, layer)
        self.lm_head = torch.nn.Linear(HIDDEN, VOCAB + 64, bias=False)  # padded, as SGLang's are
        self.logits_processor = LogitsProcessor()
        self.capture_aux_hidden_states = False

    def set_dflash_layers_to_capture(self, layers: list[int]) -> None:
        self.capture_aux_hidden_states = True
        for layer in layers:  # a second set adds to the first, as with Qwen3-MoE
            self.model.layers[layer + 1 + self.off_by]._is_layer_to_capture = True  # type: ignore[assignment]

    def forward(self, batch: Any) -> Any:
        hidden, aux = self.model(batch)
        given = (batch.input_ids, hidden, None, batch)
        return self.logits_processor(*given, aux) if self.capture_aux_hidden_states else self.logits_processor(*given)


class ServerArgs:
    max_mamba_cache_size: int | None = None

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)

    def override(self, source: str, *, max_mamba_cache_size: int) -> None:
        assert source == "specd"
        self.max_mamba_cache_size = max_mamba_cache_size


class Context:
    """Where settings are changed from 0.5.17 on."""

    def override(self, source: str, *, max_mamba_cache_size: int) -> None:
        assert source == "specd"
        Process.states = max_mamba_cache_size


def get_context() -> Context:
    return Context()


def mambaish_config(model_config: Any) -> Any:
    """What is known of a hybrid's states; None for another model."""
    if not ModelRunner.hybrid:
        return None
    return types.SimpleNamespace(mamba2_cache_params=types.SimpleNamespace(mamba_cache_per_req=STATE_BYTES))


class ModelRunner:
    """What tests set: the kind of layer, whether layers have states, what a forward raises, whether graphs suit it."""

    layer: type[Layer] = Layer
    hybrid = False
    fail: Exception | None = None
    suits = True

    def __init__(self, *, server_args: ServerArgs, **given: Any) -> None:
        assert not Process.joined, "tensor model parallel group is already initialized"
        Process.joined = True
        assert ("ps" in given) == (WRAPPED <= Process.version < PUBLISHED)
        assert ("pp_size" in given) == (Process.version < WRAPPED)
        if Process.version >= PUBLISHED:
            assert Process.published is server_args
            assert Process.groups == ["parallel", "layers"]
            self.kv_index_translator = Translator()
        self.args = self.server_args = server_args
        self.mambaish_config = mambaish_config(None)
        self.dtype = torch.float32
        text = types.SimpleNamespace(hidden_size=HIDDEN, num_hidden_layers=LAYERS, vocab_size=VOCAB)
        self.model_config = types.SimpleNamespace(hf_text_config=text, model_is_mrope=False)
        torch.manual_seed(0)
        self.model = Model(self, type(self).layer)

    def alloc_memory_pool(self) -> None:
        args: Any = self.args
        self.page_size, self.max_total_num_tokens = args.page_size, args.max_total_tokens
        self.max_running_requests = args.max_running_requests
        table = torch.zeros(self.max_running_requests + 1, args.context_length, dtype=torch.int32)
        self.req_to_token_pool = types.SimpleNamespace(req_to_token=table)
        if type(self).hybrid:
            self._keep_states()
        self.cache = torch.full((self.max_total_num_tokens + 1, HIDDEN), torch.nan)

    def _keep_states(self) -> None:
        count = Process.states if Process.version >= OVERRIDDEN else self.args.max_mamba_cache_size
        assert count is not None
        self.max_running_requests = min(self.max_running_requests, count)
        self.req_to_token_pool.mamba_pool = Pool(LAYERS, count, HIDDEN)
        self.req_to_token_pool.req_index_to_mamba_index_mapping = torch.zeros(
            len(self.req_to_token_pool.req_to_token), dtype=torch.int32
        )
        for index in (0, 2, 3):
            layer: Any = self.model.model.layers[index]
            layer.memory = Memory(self.req_to_token_pool, index)

    def init_attention_backends(self) -> None: ...

    def init_cuda_graphs(self) -> None:
        sizes = getattr(self.args, "cuda_graph_bs_prefill", None)
        self.prefill_cuda_graph_runner: Any = PrefillCudaGraphRunner(self, sizes) if sizes and self.suits else None

    def forward(self, batch: Any) -> Any:
        if (failure := type(self).fail) is not None:
            raise failure
        batch = dataclasses.replace(batch)  # SGLang's runner works on a copy
        if (graphs := self.prefill_cuda_graph_runner) is not None and graphs.can_run_graph(batch):
            return graphs.execute(batch)
        return self.model(batch)


class Translator:
    """Says which slots a forward writes; a forward without its plan writes none."""

    def own_plan(self, batch: Any) -> Any:
        def bind(bound: Any, translator: Translator) -> None:
            assert (bound, translator) == (batch, self)
            batch.plan = batch.out_cache_loc

        return types.SimpleNamespace(bind=bind)


class ParallelState:
    def __init__(
        self,
        tp_rank: int,
        tp_size: int,
        attn_tp_rank: int,
        attn_tp_size: int,
        dp_rank: None,
        moe_dp_rank: None,
        gpu_id: int,
    ) -> None:
        assert (tp_rank, tp_size) == (attn_tp_rank, attn_tp_size) == (0, 1)

    @classmethod
    def trivial(cls, **given: Any) -> ParallelState:
        return cls(**given)


class SpawnRanks:
    def __init__(self, *, world_rank: int, gpu_id: int) -> None:
        assert world_rank == 0


def publish(server_args: ServerArgs, *, role: str, ranks: SpawnRanks) -> None:
    assert role == "scheduler"
    Process.published, Process.groups = server_args, []


def init_parallel_runtime(*, server_args: ServerArgs, device: str, dist_port: int) -> None:
    assert Process.published is server_args
    Process.groups.append("parallel")


def init_layer_runtime(*, model_config: Any) -> None:
    Process.groups.append("layers")


def initialize(*given: Any) -> None:
    """Of every kind of kernel: takes the settings until they are published."""
    assert len(given) == (Process.version < PUBLISHED)
    assert Process.version < PUBLISHED or Process.published is not None


@dataclasses.dataclass(kw_only=True, eq=False)
class Batch:
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
    is_extend_in_batch: bool
    lora_ids: list[None]
    rids: list[str]
    mrope_positions: torch.Tensor | None = None


@dataclasses.dataclass(kw_only=True, eq=False)
class EarlyBatch(Batch):
    num_token_non_padded_cpu: int


@dataclasses.dataclass(kw_only=True, eq=False)
class LateBatch(Batch):
    global_num_token_non_padded_cpu: int
    residual_stream: Any = None
    plan: Any = None


def plain(model: Model, fill: Any) -> dict[str, torch.Tensor]:
    """taps 0 and 2, and final, from the weights, one sequence at a time."""
    taps, final = [], []
    for piece in torch.split(torch.from_numpy(fill.tokens.astype("int64")), fill.lengths.tolist()):
        with torch.no_grad():
            stream, states = model.model.embed_tokens(piece), []
            for layer in model.model.layers:
                mean = stream.cumsum(0) / torch.arange(1, len(piece) + 1)[:, None]
                mix: Any = layer.mix
                stream = stream + torch.tanh(mix(mean))
                states.append(stream)
            taps.append(torch.stack([states[0], states[2]], dim=1))
            final.append(model.model.norm(stream))
    return {"taps": torch.cat(taps), "final": torch.cat(final)}


def install(monkeypatch: pytest.MonkeyPatch, version: str = "0.5.14") -> None:
    """Put a package `sglang` of these pieces in place; symbols that are only called get a function."""
    monkeypatch.setattr(ModelRunner, "layer", Layer)
    monkeypatch.setattr(ModelRunner, "fail", None)
    monkeypatch.setattr(ModelRunner, "suits", True)
    monkeypatch.setattr(ModelRunner, "hybrid", False)
    monkeypatch.setattr(Process, "version", version_of(version))
    monkeypatch.setattr(Process, "published", None)
    monkeypatch.setattr(Process, "groups", [])
    monkeypatch.setattr(Process, "states", None)
    monkeypatch.setattr(Process, "joined", False)
    package: Any = types.ModuleType("sglang")
    package.__version__ = version
    monkeypatch.setitem(sys.modules, "sglang", package)
    classes = (
        ServerArgs,
        ModelRunner,
        LogitsProcessor,
        ParallelState,
        SpawnRanks,
        ResidualStream,
        PrefillCudaGraphRunner,
    )
    functions = (
        publish,
        init_parallel_runtime,
        init_layer_runtime,
        get_context,
        mambaish_config,
        destroy_model_parallel,
    )
    pieces: dict[str, Any] = {piece.__name__: piece for piece in (*classes, *functions)}
    pieces["ForwardBatch"] = LateBatch if Process.version >= PUBLISHED else EarlyBatch
    for touch in TOUCH_POINTS:
        if not touch.used(Process.version):
            continue
        if touch.module not in sys.modules:
            for depth in range(2, touch.module.count(".") + 2):
                name = ".".join(touch.module.split(".")[:depth])
                with contextlib.suppress(KeyError):
                    _ = sys.modules[name]
                    continue
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        found: Any = pieces.get(touch.symbol)
        if found is None and touch.symbol.startswith("initialize_"):
            found = initialize
        elif found is None and touch.symbol[0].islower():
            found = lambda: None  # noqa: E731
        elif found is None:
            found = type(touch.symbol, (), {})
        for name in touch.names:
            if touch.symbol in ("ServerArgs", "ModelRunner") and not hasattr(found, name):
                monkeypatch.setattr(found, name, None, raising=False)
            elif touch.symbol not in pieces and touch.symbol[0].isupper():
                setattr(found, name, staticmethod(lambda args=None: None))
        monkeypatch.setattr(sys.modules[touch.module], touch.symbol, found, raising=False)
