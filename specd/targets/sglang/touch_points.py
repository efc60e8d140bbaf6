"""The undocumented SGLang APIs in use, with the versions that have them; checked at start."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from specd.errors import ConfigError, missing_extra, pip_install
from specd.targets.sglang.versions import (
    GRAPHS,
    OVERRIDDEN,
    PUBLISHED,
    WRAPPED,
    SGLang,
    Version,
    series,
    supported,
    version_of,
)


class Touch(msgspec.Struct, frozen=True):
    """One undocumented SGLang API. names: its parameters, fields or members that are used.

    versions: that have it. since, until: the first and last version of which it is used.
    """

    module: str
    symbol: str
    names: tuple[str, ...]
    versions: str
    since: Version = (0, 0, 0)
    until: Version = (9, 9, 9)

    def used(self, version: Version) -> bool:
        """Whether it is used of a version."""
        return self.since <= version <= self.until


_SRT = "sglang.srt."
TOUCH_POINTS: Final = (
    Touch(
        _SRT + "server_args", "ServerArgs",
        ("model_path", "load_format", "dtype", "device", "tp_size", "base_gpu_id", "mem_fraction_static",
         "max_running_requests", "max_total_tokens", "context_length", "page_size", "chunked_prefill_size",
         "disable_radix_cache", "disable_cuda_graph", "disable_overlap_schedule", "skip_tokenizer_init",
         "attention_backend", "sampling_backend", "grammar_backend", "enforce_disable_flashinfer_allreduce_fusion"),
        "0.5.14–0.5.23",
    ),
    Touch(
        _SRT + "server_args", "ServerArgs",
        ("cuda_graph_backend_decode", "cuda_graph_bs_prefill", "cuda_graph_max_bs_prefill"), "0.5.17–0.5.23",
        since=GRAPHS,
    ),
    Touch(
        _SRT + "model_executor.runner.prefill_cuda_graph_runner", "PrefillCudaGraphRunner", ("can_run_graph",),
        "0.5.17–0.5.23", since=GRAPHS,
    ),
    Touch(_SRT + "configs.model_config", "ModelConfig", ("from_server_args",), "0.5.9–0.5.23"),
    Touch(
        _SRT + "model_executor.model_runner", "ModelRunner",
        ("model_config", "mem_fraction_static", "gpu_id", "tp_rank", "tp_size", "moe_ep_rank", "moe_ep_size", "pp_rank",
         "pp_size", "nccl_port", "server_args"),
        "0.5.10–0.5.15", until=(0, 5, 15),
    ),
    Touch(
        _SRT + "model_executor.model_runner", "ModelRunner",
        ("model_config", "mem_fraction_static", "gpu_id", "ps", "nccl_port", "server_args"),
        "0.5.16–0.5.20", since=WRAPPED, until=(0, 5, 18),
    ),
    Touch(
        _SRT + "distributed.parallel_state_wrapper", "ParallelState",
        ("trivial", "tp_rank", "tp_size", "attn_tp_rank", "attn_tp_size", "dp_rank", "moe_dp_rank", "gpu_id"),
        "0.5.16–0.5.20", since=WRAPPED, until=(0, 5, 18),
    ),
    Touch(
        _SRT + "model_executor.model_runner", "ModelRunner",
        ("model_config", "mem_fraction_static", "gpu_id", "nccl_port", "server_args"),
        "0.5.21–0.5.23", since=PUBLISHED,
    ),
    Touch(_SRT + "runtime_context", "publish", ("server_args", "role", "ranks"), "0.5.22–0.5.23", since=PUBLISHED),
    Touch(_SRT + "runtime_context", "SpawnRanks", ("world_rank", "gpu_id"), "0.5.22–0.5.23", since=PUBLISHED),
    Touch(
        _SRT + "distributed.bootstrap", "init_parallel_runtime", ("server_args", "device", "dist_port"),
        "0.5.22–0.5.23", since=PUBLISHED,
    ),
    Touch(_SRT + "distributed.bootstrap", "init_layer_runtime", ("model_config",), "0.5.22–0.5.23", since=PUBLISHED),
    Touch(
        _SRT + "layers.layer_boundary.residual.stream", "ResidualStream", ("residual", "pending", "complete"),
        "0.5.22–0.5.23", since=PUBLISHED,
    ),
    Touch(_SRT + "mem_cache.kv_index_translator", "KVIndexTranslator", ("own_plan",), "0.5.22–0.5.23", since=PUBLISHED),
    Touch(_SRT + "server_args", "ServerArgs", ("max_mamba_cache_size",), "0.5.14–0.5.23"),
    Touch(_SRT + "server_args", "ServerArgs", ("override",), "0.5.16–0.5.18", since=WRAPPED, until=WRAPPED),
    Touch(_SRT + "runtime_context", "get_context", (), "0.5.16–0.5.23", since=OVERRIDDEN),
    Touch(_SRT + "configs.hybrid_arch", "mambaish_config", (), "0.5.16–0.5.23", since=WRAPPED),
    Touch(_SRT + "model_executor.model_runner", "ModelRunner", ("mambaish_config",), "0.5.14–0.5.15", until=(0, 5, 15)),
    Touch(_SRT + "mem_cache.memory_pool", "HybridReqToTokenPool", ("get_mamba_indices",), "0.5.14–0.5.23"),
    Touch(_SRT + "mem_cache.memory_pool", "MambaPool", ("clear_slots",), "0.5.14–0.5.23"),
    Touch(
        _SRT + "model_executor.model_runner", "ModelRunner",
        ("alloc_memory_pool", "init_attention_backends", "init_cuda_graphs", "forward"), "0.5.14–0.5.23",
    ),
    Touch(
        _SRT + "model_executor.forward_batch_info", "ForwardBatch",
        ("forward_mode", "batch_size", "input_ids", "req_pool_indices", "seq_lens", "out_cache_loc", "seq_lens_sum",
         "orig_seq_lens", "seq_lens_cpu", "positions", "extend_num_tokens", "extend_seq_lens", "extend_prefix_lens",
         "extend_start_loc", "extend_prefix_lens_cpu", "extend_seq_lens_cpu", "extend_logprob_start_lens_cpu",
         "spec_algorithm", "capture_hidden_mode", "is_extend_in_batch", "lora_ids", "rids", "mrope_positions"),
        "0.5.14–0.5.23",
    ),
    Touch(
        _SRT + "model_executor.forward_batch_info", "ForwardBatch", ("num_token_non_padded_cpu",), "0.5.14–0.5.18",
        until=(0, 5, 18),
    ),
    Touch(
        _SRT + "model_executor.forward_batch_info", "ForwardBatch",
        ("global_num_token_non_padded_cpu", "residual_stream"), "0.5.22–0.5.23", since=PUBLISHED,
    ),
    Touch(_SRT + "model_executor.forward_batch_info", "ForwardMode", ("EXTEND",), "0.5.9–0.5.23"),
    Touch(_SRT + "model_executor.forward_batch_info", "CaptureHiddenMode", ("NULL",), "0.5.9–0.5.23"),
    Touch(_SRT + "speculative.spec_info", "SpeculativeAlgorithm", ("NONE",), "0.5.9–0.5.23"),
    Touch(_SRT + "layers.logits_processor", "LogitsProcessor", ("forward",), "0.5.9–0.5.23"),
    Touch(_SRT + "layers.moe", "initialize_moe_config", (), "0.5.14–0.5.23"),
    Touch(_SRT + "layers.quantization.fp8_utils", "initialize_fp8_gemm_config", (), "0.5.14–0.5.23"),
    Touch(_SRT + "layers.quantization.fp4_utils", "initialize_fp4_gemm_config", (), "0.5.14–0.5.23"),
    Touch(
        _SRT + "layers.quantization.unquant", "initialize_bf16_gemm_config", (), "0.5.17–0.5.23", since=(0, 5, 17)
    ),
    Touch(_SRT + "distributed.parallel_state", "get_tp_group", (), "0.5.9–0.5.23"),
    Touch(_SRT + "distributed.parallel_state", "destroy_model_parallel", (), "0.5.9–0.5.23"),
    Touch(_SRT + "distributed.parallel_state", "destroy_distributed_environment", (), "0.5.9–0.5.23"),
)  # fmt: skip
"""And of a loaded model: `model.layers` (each returns (hidden, residual), or hidden; from 0.5.22 on hidden, the rest
is in `ForwardBatch.residual_stream`), `model.norm`, `logits_processor(input_ids, hidden, lm_head, batch, aux)`,
`embed_tokens.weight`, `lm_head.weight`, the setters of official.py and their flags; of the runner: `model`,
`req_to_token_pool.req_to_token`, of hybrids also `mamba_pool.mamba_cache` and `req_index_to_mamba_index_mapping` there
and their config's `mamba2_cache_params.mamba_cache_per_req`, `max_total_num_tokens`, `max_running_requests`,
`page_size`, and from 0.5.22 on `kv_index_translator`; with graphs `prefill_cuda_graph_runner` and its
`prefill_backend_name`; whether positions have three axes: `model_config.model_is_mrope`, up to 0.5.15 the runner's."""


IMAGE_POINTS: Final = (
    Touch(
        _SRT + "managers.schedule_batch", "MultimodalDataItem",
        ("modality", "hash", "feature", "offsets", "model_specific_data", "set_pad_value", "pad_value"),
        "0.5.14–0.5.23",
    ),
    Touch(_SRT + "managers.schedule_batch", "MultimodalInputs", ("mm_items", "im_token_id"), "0.5.14–0.5.23"),
    Touch(_SRT + "managers.schedule_batch", "Modality", ("IMAGE",), "0.5.14–0.5.23"),
    Touch(_SRT + "managers.mm_utils", "init_mm_embedding_cache", (), "0.5.14–0.5.18", until=(0, 5, 18)),
    Touch(_SRT + "managers.mm_schedule", "init_mm_embedding_cache", (), "0.5.22–0.5.23", since=PUBLISHED),
    Touch(_SRT + "model_executor.forward_batch_info", "ForwardBatch", ("mm_inputs",), "0.5.14–0.5.23"),
)  # fmt: skip
"""What is used of it for targets that read images. And of these: `get_image_feature`; of the runner's
`model_config.hf_config`: `image_token_id` and `vision_config.spatial_merge_size`."""


def touch_points(points: Sequence[Touch] = TOUCH_POINTS) -> SGLang:
    """Import those of `points` that are used of the installed SGLang.

    Raises ConfigError when SGLang is not installed, has another version, or has changed.
    """
    try:
        found_version = str(importlib.import_module("sglang").__version__)
    except ModuleNotFoundError as error:
        if error.name == "sglang":
            raise missing_extra("sglang", "sglang") from None
        raise ConfigError(
            f"sglang cannot be imported ({error}); install it whole, with {pip_install('sglang')}, or use "
            f"--backend transformers"
        ) from error
    remedy = f"install a fitting one with {pip_install('sglang')}, or use --backend transformers"
    version = version_of(found_version)
    if not supported(version):
        raise ConfigError(f"sglang {found_version} is installed, expected {series()}; {remedy}")
    symbols: dict[str, Any] = {}
    for touch in points:
        if not touch.used(version):
            continue
        try:
            symbols[touch.symbol] = found = getattr(importlib.import_module(touch.module), touch.symbol)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"sglang {found_version} has no usable {touch.module}.{touch.symbol} ({error}), which specd uses of "
                f"{touch.versions}; {remedy}"
            ) from error
        if lost := [name for name in touch.names if name not in _members(found)]:
            raise ConfigError(
                f"sglang {found_version}: {touch.module}.{touch.symbol} has no {', '.join(lost)}, which specd uses of "
                f"{touch.versions}; {remedy}"
            )
    return SGLang(version=version, symbols=symbols)


def _members(found: Any) -> set[str]:
    names = set(dir(found))
    with contextlib.suppress(TypeError, ValueError):
        names |= set(inspect.signature(found).parameters)
    if dataclasses.is_dataclass(found):
        names |= {field.name for field in dataclasses.fields(found)}
    return names
