"""The undocumented SGLang APIs in use, with the versions that have them; checked at start."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import re
from typing import Any, Final

import msgspec

from specd.errors import ConfigError, missing_extra, pip_install

VERSIONS: Final = ((0, 5, 14), (0, 5, 15))
"""The first and the last SGLang with these touch points; 0.5.14 is tested."""


class Touch(msgspec.Struct, frozen=True):
    """One undocumented SGLang API. names: its parameters, fields or members that are used."""

    module: str
    symbol: str
    names: tuple[str, ...]
    versions: str


_SRT = "sglang.srt."
TOUCH_POINTS: Final = (
    Touch(
        _SRT + "server_args", "ServerArgs",
        ("model_path", "load_format", "dtype", "device", "tp_size", "base_gpu_id", "mem_fraction_static",
         "max_running_requests", "max_total_tokens", "context_length", "page_size", "chunked_prefill_size",
         "disable_radix_cache", "disable_cuda_graph", "disable_overlap_schedule", "skip_tokenizer_init",
         "attention_backend", "sampling_backend", "grammar_backend", "enforce_disable_flashinfer_allreduce_fusion"),
        "0.5.14–0.5.15",
    ),
    Touch(_SRT + "configs.model_config", "ModelConfig", ("from_server_args",), "0.5.9–0.5.23"),
    Touch(
        _SRT + "model_executor.model_runner", "ModelRunner",
        ("model_config", "mem_fraction_static", "gpu_id", "tp_rank", "tp_size", "moe_ep_rank", "moe_ep_size", "pp_rank",
         "pp_size", "nccl_port", "server_args"),
        "0.5.10–0.5.15",
    ),
    Touch(
        _SRT + "model_executor.model_runner", "ModelRunner",
        ("alloc_memory_pool", "init_attention_backends", "init_cuda_graphs", "forward"), "0.5.14–0.5.15",
    ),
    Touch(
        _SRT + "model_executor.forward_batch_info", "ForwardBatch",
        ("forward_mode", "batch_size", "input_ids", "req_pool_indices", "seq_lens", "out_cache_loc", "seq_lens_sum",
         "orig_seq_lens", "seq_lens_cpu", "positions", "extend_num_tokens", "extend_seq_lens", "extend_prefix_lens",
         "extend_start_loc", "extend_prefix_lens_cpu", "extend_seq_lens_cpu", "extend_logprob_start_lens_cpu",
         "spec_algorithm", "capture_hidden_mode", "num_token_non_padded_cpu", "is_extend_in_batch", "lora_ids", "rids"),
        "0.5.14–0.5.15",
    ),
    Touch(_SRT + "model_executor.forward_batch_info", "ForwardMode", ("EXTEND",), "0.5.9–0.5.23"),
    Touch(_SRT + "model_executor.forward_batch_info", "CaptureHiddenMode", ("NULL",), "0.5.9–0.5.23"),
    Touch(_SRT + "speculative.spec_info", "SpeculativeAlgorithm", ("NONE",), "0.5.9–0.5.23"),
    Touch(_SRT + "layers.logits_processor", "LogitsProcessor", ("forward",), "0.5.9–0.5.23"),
    Touch(_SRT + "layers.moe", "initialize_moe_config", ("server_args",), "0.5.14–0.5.15"),
    Touch(_SRT + "layers.quantization.fp8_utils", "initialize_fp8_gemm_config", ("server_args",), "0.5.14–0.5.15"),
    Touch(_SRT + "layers.quantization.fp4_utils", "initialize_fp4_gemm_config", ("server_args",), "0.5.14–0.5.15"),
    Touch(_SRT + "distributed.parallel_state", "get_tp_group", (), "0.5.9–0.5.23"),
    Touch(_SRT + "distributed.parallel_state", "destroy_model_parallel", (), "0.5.9–0.5.23"),
    Touch(_SRT + "distributed.parallel_state", "destroy_distributed_environment", (), "0.5.9–0.5.23"),
)  # fmt: skip
"""And of a loaded model: `model.layers` (each returns (hidden, residual), or hidden), `model.norm`,
`logits_processor(input_ids, hidden, …)`, `get_input_embeddings().weight`, `lm_head.weight`; of the runner: `model`,
`req_to_token_pool.req_to_token`, `max_total_num_tokens`, `max_running_requests`, `page_size`."""


def touch_points() -> dict[str, Any]:
    """Import all TOUCH_POINTS; returns them by symbol.

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
    first, last = (".".join(map(str, version)) for version in VERSIONS)
    remedy = f"install a fitting one with {pip_install('sglang')}, or use --backend transformers"
    numbers = tuple(int(part) for part in re.findall(r"\d+", found_version)[:3])
    if not VERSIONS[0] <= numbers <= VERSIONS[1]:
        raise ConfigError(f"sglang {found_version} is installed, expected {first} to {last}; {remedy}")
    symbols: dict[str, Any] = {}
    for touch in TOUCH_POINTS:
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
    return symbols


def _members(found: Any) -> set[str]:
    names = set(dir(found))
    with contextlib.suppress(TypeError, ValueError):
        names |= set(inspect.signature(found).parameters)
    if dataclasses.is_dataclass(found):
        names |= {field.name for field in dataclasses.fields(found)}
    return names
