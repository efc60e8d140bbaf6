"""The SGLang backend: prefill-only forwards of SGLang's model runner, each tap added by a hook straight into its slot.

SGLang stays unmodified: its internals in use are listed in TOUCH_POINTS and checked at start; versions.py has what
differs between its versions. Its scheduler, radix cache, sampler and lm_head are not used. A forward owns the whole KV
cache: its tokens take slots 1…T (slot 0 is SGLang's padding), so nothing is allocated or freed between forwards.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

import numpy as np
import torch
import torch._dynamo
from numpy.typing import NDArray

from specd.errors import ConfigError, TargetError
from specd.protocol.payload import Payload
from specd.targets.sglang.capture import AllCaptured, Capture, Sink, head_hook, layer_hook
from specd.targets.sglang.graphs import Source, record
from specd.targets.sglang.images import Images
from specd.targets.sglang.model import liven, parts
from specd.targets.sglang.official import Official
from specd.targets.sglang.recurrent import States, plan
from specd.targets.sglang.setup import AT_HEAD, RankSetup
from specd.targets.sglang.stream import residual_is_ignored
from specd.targets.sglang.touch_points import touch_points
from specd.targets.sglang.versions import (
    UnusualResidual,
    graph_settings,
    make_batch,
    start_runner,
    uses_mrope,
)
from specd.targets.transforms import Transforms, of_rows, probe_ids

log = logging.getLogger(__name__)

MAX_SEQUENCES: Final = 2048
"""Sequences in one forward: SGLang keeps a table of this many rows of context length, int32."""

SELF_CHECK: Final = 0.03
"""Largest difference between norm(last layer's tap) and `final`, relative to the largest of `final` (bfloat16)."""


class Engine:
    """One rank of the target: SGLang's model runner, and the forwards through it. Lives on one thread.

    Raises ConfigError or TargetError when SGLang cannot be used or cannot host the model.
    """

    def __init__(self, setup: RankSetup) -> None:
        self._sg = touch_points()
        self._setup = setup
        try:
            self._load(setup)
        except BaseException:
            if setup.tp == 1:  # else the other ranks would have to leave, too, and may be gone or hang
                with contextlib.suppress(Exception):  # it is not why the load failed
                    self._leave_groups()
            raise

    def _load(self, setup: RankSetup) -> None:
        """Load the model, and check that its states are what its layers say."""
        sg = self._sg
        # Where a trainer compiles in this process, torch takes all threads for tracing (2.9–2.13), in which what SGLang
        # has compiled must not be called. So on this thread, where forwards run, that runs uncompiled meanwhile.
        torch._dynamo.config.error_on_nested_fx_trace = False
        on_gpu = setup.device == "cuda"
        if on_gpu:
            _collect()  # what a target held that failed here before
        self._device = torch.device("cuda", setup.gpu + setup.rank) if on_gpu else torch.device("cpu")
        if setup.tp > 1:
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # as SGLang's own launcher does
            # Free memory may differ between the GPUs, as with a trainer on one of them.
            os.environ.setdefault("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "0")
        sequences = min(setup.max_tokens, MAX_SEQUENCES)
        args = sg["ServerArgs"](
            model_path=setup.path,
            load_format=setup.load_format,
            dtype=setup.dtype,
            device=setup.device,
            tp_size=setup.tp,
            base_gpu_id=setup.gpu,
            mem_fraction_static=setup.memory_fraction,
            max_running_requests=sequences,
            max_total_tokens=max(setup.max_tokens, 2 * sequences),  # SGLang allows half as many requests as tokens
            context_length=setup.context,
            page_size=1,
            chunked_prefill_size=-1,
            disable_radix_cache=True,
            **graph_settings(setup.prefill_graphs),
            disable_overlap_schedule=True,
            skip_tokenizer_init=True,
            attention_backend=setup.attention_backend or None,
            sampling_backend="pytorch",
            grammar_backend="none",
            enforce_disable_flashinfer_allreduce_fusion=True,  # else a layer's output may still lack its all-reduce
        )
        self.runner = start_runner(sg, args, setup, setup.gpu + setup.rank if on_gpu else setup.rank)
        self.model = self.runner.model
        self._parts = parts(self.model)
        self.layers = self._parts.layers
        self._official = Official(self.model)
        self._source: Official | None = None  # of the taps; None: our hooks
        self.hidden_alone = False  # is the stream, whatever layers return besides
        self._mrope = uses_mrope(self.runner)
        self.images = Images(self.runner)
        if setup.load_format == "dummy":
            liven(self.model, setup.rank)
        plan(sg, self.runner, self._device, sequences)
        self.runner.alloc_memory_pool()
        self.runner.init_attention_backends()
        self._graphs = record(sg, self.runner, self.layers, setup)
        if self.runner.page_size != 1 or self.runner.max_total_num_tokens < setup.max_tokens:
            raise ConfigError(
                f"the KV cache holds {self.runner.max_total_num_tokens} tokens in pages of {self.runner.page_size}, "
                f"expected {setup.max_tokens} in pages of 1: lower target.max_forward_tokens, raise "
                f"target.memory_fraction, or take another --attention-backend"
            )
        self.max_sequences = int(self.runner.max_running_requests)
        capacity = int(self.runner.max_total_num_tokens)
        self._cache_slots = torch.arange(1, capacity + 1, dtype=torch.int64, device=self._device)
        self._rows = torch.arange(1, self.max_sequences + 1, dtype=torch.int64, device=self._device)
        self.states = States(self.runner, self._rows)
        self._zeros = torch.zeros(self.max_sequences, dtype=torch.int32, device=self._device)
        self._table: torch.Tensor = self.runner.req_to_token_pool.req_to_token
        try:
            self._check_convention()
        except UnusualResidual:
            if not self._official.exact:
                raise
            self._source = self._official
        self._check_official()
        self.states.check(2, type(self.model).__name__)
        if self._graphs is not None:
            self._graphs.check(self._all_states)

    def forward(self, tokens: NDArray[np.int32], lengths: Sequence[int], stop: int, capture: Capture) -> None:
        """Launch one prefill of `lengths` packed sequences up to layer `stop`, or with AT_HEAD up to the lm_head.

        Every rank gives the same taps: a tap may have to finish a layer's all-reduce.
        """
        self._launch(tokens, lengths, stop, capture, self._source if capture.taps else None)

    def _launch(
        self, tokens: NDArray[np.int32], lengths: Sequence[int], stop: int, capture: Capture, source: Source | None
    ) -> None:
        handles = []
        with torch.inference_mode(), self._current():  # clearing states may be a kernel of SGLang's own
            batch = self._batch(tokens, list(lengths), capture.brought)
        # A graph's embeddings are of tokens alone.
        if source is None and self._graphs is not None and not capture.brought and self._graphs.replays(batch):
            source = self._graphs

        def end(*_: Any) -> None:
            raise AllCaptured

        try:
            if source is not None:
                source.use(sorted(capture.taps))
            else:
                for tap, sink in capture.taps.items():
                    hook = layer_hook(sink, tokens.size, self.hidden_alone)
                    handles.append(self.layers[tap].register_forward_hook(hook, with_kwargs=True))
            if stop != AT_HEAD and source is None:
                handles.append(self.layers[stop].register_forward_hook(end))
            else:
                hook = head_hook(capture, source)
                handles.append(self._parts.head.register_forward_pre_hook(hook, with_kwargs=True))
            with torch.inference_mode(), self._current():
                self.runner.forward(batch)
            raise TargetError("SGLang's forward ended without a call of the layer or the logits_processor it ends at")
        except AllCaptured:
            pass
        finally:
            for handle in handles:
                handle.remove()

    def _all_states(self, tokens: NDArray[np.int32], lengths: Sequence[int]) -> torch.Tensor:
        """The outputs of all layers and the final state of one forward: [L + 1, T, H]."""
        size, hidden = int(tokens.size), int(self.runner.model_config.hf_text_config.hidden_size)
        shape = len(self.layers) + 1, size, hidden
        states = torch.empty(shape, dtype=self.runner.dtype, device=self._device)
        *layers, final = states
        taps: dict[int, Sink] = {layer: [(0, size, out)] for layer, out in enumerate(layers)}
        self._launch(tokens, lengths, AT_HEAD, Capture(taps=taps, final=[(0, size, final)]), None)
        return states

    def weights(self) -> dict[str, torch.Tensor]:
        """`embedding` and `lm_head`, unsharded, [V, H], on the host if tp > 1; a collective: every rank calls it."""
        vocabulary = int(self.runner.model_config.hf_text_config.vocab_size)
        modules: dict[str, Any] = {"embedding": self._parts.embedding, "lm_head": self._parts.lm_head}
        found: dict[str, torch.Tensor] = {}
        for name, module in modules.items():
            if name == "lm_head" and module is modules["embedding"]:
                found[name] = found["embedding"]
                continue
            weight: torch.Tensor = module.weight.detach()
            if self._setup.tp > 1:
                with self._current():
                    weight = self._sg["get_tp_group"]().all_gather(weight, dim=0)
                weight = weight[:vocabulary].cpu() if self._setup.rank == 0 else weight[:0]
            found[name] = weight[:vocabulary]
        return found

    def transforms(self, embedding: torch.Tensor) -> Transforms:
        """What becomes of rows of `embedding`, as of `weights`, and of products with lm_head; a collective, too."""
        config = vars(self.runner.model_config.hf_text_config)
        ids = probe_ids(int(config["vocab_size"]))
        with torch.inference_mode(), self._current():
            given = self._parts.embedding(ids.to(self._device))
        if self._setup.rank:
            return Transforms()
        found = of_rows(embedding[ids.to(embedding.device)], given.to(embedding.device), config)
        # What reads `final` is this module: models that scale states do so in front of it.
        scale = getattr(self._parts.head, "logit_scale", None)
        found["logit_scale"] = 1.0 if scale is None else float(scale)
        found["logit_softcap"] = float(getattr(self._parts.head, "final_logit_softcapping", None) or 0.0)
        bias = getattr(self._parts.lm_head, "bias", None)
        if bias is not None and bool(bias.any()):
            found["odd_logits"] = "its lm_head has a bias, which trainers do not get"
        return Transforms(**found)

    def close(self) -> None:
        """Free what SGLang holds, its process groups too. No other engine may live in this process."""
        del self.runner, self.model, self.layers, self._parts, self._official, self._source, self._table, self._graphs
        del self.states
        self._leave_groups()
        _collect()

    def _leave_groups(self) -> None:
        """End SGLang's process groups, so that this process can load a model again."""
        self._sg["destroy_model_parallel"]()
        self._sg["destroy_distributed_environment"]()

    def _current(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _batch(self, tokens: NDArray[np.int32], lengths: list[int], brought: Sequence[Payload] = ()) -> Any:
        """SGLang's ForwardBatch of a prefill without prefix: one copy to the device, no wait."""
        size, count = int(tokens.size), len(lengths)
        on_gpu = self._device.type == "cuda"
        host = torch.empty(3 * size + 2 * count, dtype=torch.int64, pin_memory=on_gpu)
        view = host.numpy()
        ids_of, inputs, axes = self.images.inputs(tokens, lengths, brought) if brought else (tokens, None, None)
        view[:size] = ids_of
        view[size : 2 * size] = np.concatenate([np.arange(length) for length in lengths])
        view[2 * size : 3 * size] = np.repeat(np.arange(1, count + 1), lengths)
        view[3 * size : 3 * size + count] = lengths
        view[3 * size + count :] = list(accumulate(lengths[:-1], initial=0))
        seq_lens_cpu = host[3 * size : 3 * size + count].clone()
        device = host.to(self._device, non_blocking=True)
        ids, positions, rows = device[: 3 * size].view(3, size)
        seq_lens, starts = device[3 * size :].view(2, count)
        short = torch.stack([seq_lens, starts]).to(torch.int32)
        cache_slots = self._cache_slots[:size]
        self.states.clear(count)
        self._table[rows, positions] = cache_slots.to(self._table.dtype)
        fields: dict[str, Any] = {
            "forward_mode": self._sg["ForwardMode"].EXTEND,
            "batch_size": count,
            "input_ids": ids,
            "req_pool_indices": self._rows[:count],
            "seq_lens": seq_lens,
            "out_cache_loc": cache_slots,
            "seq_lens_sum": size,
            "orig_seq_lens": short[0],
            "seq_lens_cpu": seq_lens_cpu,
            "positions": positions,
            "extend_num_tokens": size,
            "extend_seq_lens": short[0],
            "extend_prefix_lens": self._zeros[:count],
            "extend_start_loc": short[1],
            "extend_prefix_lens_cpu": [0] * count,
            "extend_seq_lens_cpu": lengths,
            "extend_logprob_start_lens_cpu": lengths,
            "spec_algorithm": self._sg["SpeculativeAlgorithm"].NONE,
            "capture_hidden_mode": self._sg["CaptureHiddenMode"].NULL,
            "is_extend_in_batch": True,
            "lora_ids": [None] * count,
            "rids": [str(row) for row in range(count)],
            "mrope_positions": positions.expand(3, -1) if self._mrope else None,
        }
        if axes is not None:
            fields |= {"mm_inputs": inputs, "mrope_positions": torch.from_numpy(axes).to(self._device)}
        return make_batch(self._sg, self.runner, size, fields)

    def _check_convention(self) -> None:
        """Refuse a model whose layers do not return the residual stream as expected: the norm of the last layer's tap
        must be what lm_head reads. It also loads the kernels."""
        hidden = int(self.runner.model_config.hf_text_config.hidden_size)
        last, final = (torch.empty(8, hidden, dtype=self.runner.dtype, device=self._device) for _ in range(2))
        tokens = np.arange(8, dtype=np.int32)

        def run(taps: dict[int, Sink]) -> torch.Tensor:
            self.forward(tokens, [5, 3], AT_HEAD, Capture(taps=taps, final=[(0, 8, final)]))
            return final.clone()

        self.hidden_alone = residual_is_ignored(self.layers, lambda: run({}), SELF_CHECK)
        run({len(self.layers) - 1: [(0, 8, last)]})
        with torch.inference_mode(), self._current():
            normed = self._parts.norm(last.clone())
        normed = (normed[0] if isinstance(normed, tuple) else normed).float()
        largest = float(final.float().abs().max())
        if not torch.allclose(normed, final.float(), rtol=0, atol=SELF_CHECK * largest, equal_nan=True):
            difference = float((normed - final.float()).abs().max())
            raise TargetError(
                f"SGLang's {type(self.model).__name__} does not end in the norm of its last layer's output: "
                f"they differ by {difference:.3g}, expected at most {SELF_CHECK * largest:.3g}; use another backend"
            )

    def _check_official(self) -> None:
        """Warn where SGLang's own capture differs from our taps: a draft that it serves sees other states than one that
        is trained here. Raises TargetError where that capture is the only source and does not work."""
        count, hidden = len(self.layers), int(self.runner.model_config.hf_text_config.hidden_size)
        taps = sorted({0, count // 2} - {count - 1})
        if not (self._official.setter and taps):
            return
        ours, theirs = (
            torch.empty(len(taps), 8, hidden, dtype=self.runner.dtype, device=self._device) for _ in range(2)
        )
        tokens = np.arange(8, dtype=np.int32)

        def take(states: torch.Tensor, source: Official | None) -> None:
            sinks: dict[int, Sink] = {tap: [(0, 8, states[k])] for k, tap in enumerate(taps)}
            self._launch(tokens, [5, 3], AT_HEAD, Capture(taps=sinks, final=[]), source)

        if self._source is not None:
            take(theirs, self._source)
            return
        try:
            take(theirs, self._official)
        except (TargetError, LookupError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            log.warning("SGLang's own capture of layers %s fails, nothing to compare with: %s", taps, error)
            return
        finally:
            self._official.off()
        take(ours, None)
        for tap, our, their in zip(taps, ours.float(), theirs.float(), strict=True):
            difference, largest = float((our - their).abs().max()), float(our.abs().max())
            if not difference <= SELF_CHECK * largest and self._setup.rank == 0:
                log.warning(
                    "layer %d: what SGLang's %s feeds to a draft differs by %.3g from its output (up to %.3g), which "
                    "drafts are trained on here",
                    tap, type(self.model).__name__, difference, largest,
                )  # fmt: skip


def _collect() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing where there is no GPU
