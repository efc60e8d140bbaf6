"""What differs between the SGLangs in use: how a runner starts, a batch's fields, where a layer leaves its residual."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from specd.errors import TargetError
from specd.targets.sglang.setup import RankSetup

Version = tuple[int, int, int]

SERIES: Final[tuple[tuple[Version, Version], ...]] = (((0, 5, 14), (0, 5, 18)), ((0, 5, 22), (0, 5, 23)))
"""First and last version of each run that works. 0.5.19 is not tried; 0.5.20–0.5.21 have a form of their own."""

WRAPPED: Final[Version] = (0, 5, 16)
"""From here on ModelRunner takes one ParallelState instead of six ranks and sizes."""

OVERRIDDEN: Final[Version] = (0, 5, 17)
"""From here on a setting is changed in the process's context, before that in the ServerArgs."""

PUBLISHED: Final[Version] = (0, 5, 22)
"""From here on a process publishes its settings before anything reads them, process groups are made outside ModelRunner
and a layer returns one tensor: the batch's ResidualStream has the residual, and an all-reduce that may be to do."""


GRAPHS: Final[Version] = (0, 5, 17)
"""From here on prefill graphs take any number of sequences, broken at attention, and their settings have one form."""


class SGLang(msgspec.Struct, frozen=True):
    """An installed SGLang. symbols: what is used of it, by name."""

    version: Version
    symbols: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.symbols[name]

    @property
    def published(self) -> bool:
        """Whether settings are published and residuals kept in a stream."""
        return self.version >= PUBLISHED


class UnusualResidual(TargetError):
    """A layer's output joins the residual stream by something else than an addition."""


def version_of(text: str) -> Version:
    """The three numbers of a version such as 0.5.17.post1."""
    major, minor, micro = (*(int(part) for part in re.findall(r"\d+", text)[:3]), 0, 0, 0)[:3]
    return major, minor, micro


def supported(version: Version) -> bool:
    """Whether a version is in SERIES."""
    return any(first <= version <= last for first, last in SERIES)


def series() -> str:
    """SERIES in words."""
    return " or ".join(" to ".join(".".join(map(str, version)) for version in run) for run in SERIES)


def graph_settings(buckets: Sequence[int]) -> dict[str, Any]:
    """ServerArgs of prefill graphs for these numbers of tokens, or of none.

    Their kind is left to SGLang: for one that is asked for by name it skips its rules of what models it suits.
    """
    if not buckets:
        return {"disable_cuda_graph": True}
    return {
        "cuda_graph_backend_decode": "disabled",
        "cuda_graph_bs_prefill": list(buckets),
        "cuda_graph_max_bs_prefill": max(buckets),
    }


def start_runner(sg: SGLang, args: Any, setup: RankSetup, gpu: int) -> Any:
    """SGLang's ModelRunner with its weights loaded and its process groups made. gpu: this rank's device index."""
    starters = [sg[name] for name in sg.symbols if name.startswith("initialize_")]
    common = {
        "mem_fraction_static": setup.memory_fraction,
        "gpu_id": gpu,
        "nccl_port": setup.port,
        "server_args": args,
    }
    if sg.published:
        # One host and no pipeline: the tensor-parallel rank is the rank in the world.
        sg["publish"](args, role="scheduler", ranks=sg["SpawnRanks"](world_rank=setup.rank, gpu_id=gpu))
        for start in starters:
            start()
        config = sg["ModelConfig"].from_server_args(args)
        sg["init_parallel_runtime"](server_args=args, device=setup.device, dist_port=setup.port)
        sg["init_layer_runtime"](model_config=config)
        return sg["ModelRunner"](model_config=config, **common)
    for start in starters:
        start(args)
    if sg.version >= WRAPPED:
        ranks = {
            "ps": sg["ParallelState"].trivial(
                tp_rank=setup.rank,
                tp_size=setup.tp,
                attn_tp_rank=setup.rank,
                attn_tp_size=setup.tp,
                dp_rank=None,
                moe_dp_rank=None,
                gpu_id=gpu,
            )
        }
    else:
        ranks = {
            "tp_rank": setup.rank,
            "tp_size": setup.tp,
            "moe_ep_rank": 0,
            "moe_ep_size": 1,
            "pp_rank": 0,
            "pp_size": 1,
        }
    return sg["ModelRunner"](model_config=sg["ModelConfig"].from_server_args(args), **ranks, **common)


def uses_mrope(runner: Any) -> bool:
    """Whether positions have three axes, as those of targets that read images have, for text too."""
    said = getattr(runner.model_config, "model_is_mrope", None)  # the runner itself said so up to 0.5.15
    return bool(getattr(runner, "model_is_mrope", False) if said is None else said)


def state_bytes(sg: SGLang, runner: Any) -> int:
    """What the recurrent layers of a runner's model keep for one sequence, in bytes on this rank; 0 without any."""
    found = sg["mambaish_config"](runner.model_config) if sg.version >= WRAPPED else runner.mambaish_config
    return 0 if found is None else int(found.mamba2_cache_params.mamba_cache_per_req)


def cap_states(sg: SGLang, runner: Any, count: int) -> None:
    """Set how many sequences' recurrent states the pool of a runner will hold."""
    if sg.version >= OVERRIDDEN:
        sg["get_context"]().override("specd", max_mamba_cache_size=count)
    elif sg.version >= WRAPPED:
        runner.server_args.override("specd", max_mamba_cache_size=count)
    else:
        runner.server_args.max_mamba_cache_size = count


def make_batch(sg: SGLang, runner: Any, num_tokens: int, fields: Mapping[str, Any]) -> Any:
    """A ForwardBatch of `fields`, with what its version wants besides."""
    if not sg.published:
        return sg["ForwardBatch"](num_token_non_padded_cpu=num_tokens, **fields)
    batch = sg["ForwardBatch"](global_num_token_non_padded_cpu=num_tokens, **fields)
    translator = runner.kv_index_translator  # which slots of which pool this forward writes
    translator.own_plan(batch).bind(batch, translator)
    return batch


def layer_output(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> tuple[Any, Any, Any]:
    """A layer's (hidden, residual or None, what it returns from now on). args, kwargs: what it was called with.

    A collective of all ranks where an all-reduce was still to do. Raises UnusualResidual.
    """
    streams = (getattr(given, "residual_stream", None) for given in (*args, *kwargs.values()))
    stream = next((found for found in streams if found is not None), None)
    if stream is None:
        # A third one holds the indices of DeepSeek's sparse attention.
        hidden, residual = output[:2] if isinstance(output, tuple) and len(output) in (2, 3) else (output, None)
        return hidden, residual, output
    pending = stream.pending
    if pending is not None and not pending.update.is_plain_add:
        raise UnusualResidual(
            f"SGLang's layers change the residual stream by {type(pending.update).__name__}, expected an addition; "
            f"use --backend transformers"
        )
    given, *rest = output if isinstance(output, tuple) else (output,)
    hidden = stream.complete(given)  # the next layer takes this instead: the stream does not know the old one any more
    return hidden, None if pending is None else stream.residual, (hidden, *rest) if rest else hidden
