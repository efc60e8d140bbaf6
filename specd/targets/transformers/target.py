"""The transformers backend: packed sequences through the backbone, each tap copied by a hook straight into its slot."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from specd.config.settings import TargetConfig
from specd.errors import TargetError
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.artifacts import Artifacts
from specd.targets.base import CaptureJob, Launched, check, slot_tensors
from specd.targets.digest import dummy_digest, weights_digest
from specd.targets.source import dummy_config, resolve, with_tokenizer
from specd.targets.transformers.load import load_network
from specd.targets.transformers.packed_attention import ATTENTION, Packed, packed_attention

logger = logging.getLogger(__name__)


class _LastTap(Exception):
    """Ends a forward after its last tap; never leaves this module."""


class TransformersTarget:
    """A causal LM of transformers as a Target. Runs the decoder alone: no lm_head, no layer above the last tap.

    Raises ConfigError or TargetError when the model cannot be loaded, or cannot run packed sequences.
    """

    settings: ClassVar[frozenset[str]] = frozenset({"tokenizer"})

    def __init__(self, config: TargetConfig) -> None:
        dummy = config.load_format == "dummy"
        source = with_tokenizer(resolve(config.model, need="shape" if dummy else "weights"), config.tokenizer)
        try:
            network = load_network(
                source,
                dtype=config.dtype,
                device=config.device,
                load_format=config.load_format,
                num_layers=config.num_layers,
            )
        except torch.OutOfMemoryError as error:
            raise TargetError(
                f"target {source.name} does not fit in the memory of {config.device}: {error}; free some, take another "
                f"device (--device cuda:N) or a smaller dtype (--dtype bfloat16)"
            ) from None
        _refuse_unpackable(source.name, network)
        AttentionInterface.register(ATTENTION, packed_attention)
        network.set_attn_implementation(ATTENTION)
        _use_grouped_experts(network)
        self._name = source.name
        self._threads = config.threads
        self._thread = 0
        self._decoder: Any = network.get_decoder()  # type: ignore[no-untyped-call]
        self._layers: Sequence[torch.nn.Module] = self._decoder.layers
        self._device = network.device
        self.device = str(network.device)
        published = dummy_config(source, config.num_layers) if dummy else source.config
        self._artifacts = Artifacts(source, published, _artifact_tensors(network))
        digest = dummy_digest(published, self._device.type) if dummy or not source.path else weights_digest(source.path)
        dtype = str(network.dtype).removeprefix("torch.")
        self.contract = self._artifacts.contract(
            source, network.config.get_text_config(), network.config.model_type, dtype, digest
        )
        self._try_out()

    def run(self, fills: Sequence[CaptureJob]) -> Launched | None:
        """See Target.run. One forward over all sequences of all fills; cost of attention is the sum of length²."""
        if self._decoder is None:
            raise TargetError(f"target {self._name} is closed")
        spec = check(self.contract, fills)
        self._use_threads()
        lengths = [int(length) for fill in fills for length in fill.lengths]
        tokens = np.concatenate([fill.tokens for fill in fills]).astype(np.int64)
        positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
        on_gpu = self._device.type == "cuda"
        try:
            # Kernels that are not torch's own are launched on whatever device is current.
            with torch.inference_mode(), torch.cuda.device(self._device) if on_gpu else contextlib.nullcontext():
                return self._forward(fills, spec, Packed(lengths, self._device), tokens, positions)
        except RuntimeError as error:
            if on_gpu:
                # A CUDA fault poisons the process: only running out of memory leaves the target alive there.
                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                torch.cuda.synchronize(self._device)
            raise TargetError(f"target {self._name}: a forward of {tokens.size} tokens failed: {error}") from error

    def artifact(self, name: str) -> memoryview:
        """See Target.artifact. Weights on a GPU are copied to the host on the first call, and kept there."""
        return self._artifacts.read(name)

    def close(self) -> None:
        """See Target.close."""
        self._decoder, self._layers = None, ()
        self._artifacts.close()

    def _try_out(self) -> None:
        """Run two one-token sequences: a model that cannot be hosted fails at the start, and kernels are loaded."""
        spec = CaptureSpec(taps=(), final=True, dtype="float32")
        layout = slot_layout(spec, self.contract.hidden_size, 2)
        tokens, lengths = np.zeros(2, dtype=np.int32), np.ones(2, dtype=np.int32)
        slot = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
        completion = self.run([CaptureJob(tokens=tokens, lengths=lengths, spec=spec, layout=layout, slot=slot)])
        if completion is not None:
            completion.wait()

    def _forward(
        self, fills: Sequence[CaptureJob], spec: CaptureSpec, packed: Packed, tokens: Any, positions: Any
    ) -> Launched | None:
        rows = tuple(accumulate((int(fill.tokens.size) for fill in fills), initial=0))
        views = [slot_tensors(fill) for fill in fills]
        stop_after = -1 if spec.final or not spec.taps else spec.taps[-1]

        def copy_tap(tap: int, index: int) -> Callable[..., None]:
            def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
                hidden_TH = (output[0] if isinstance(output, tuple) else output)[0]
                for view, (start, end) in zip(views, pairwise(rows), strict=True):
                    view["taps"][:, index].copy_(hidden_TH[start:end])
                if tap == stop_after:
                    raise _LastTap

            return hook

        handles = [self._layers[tap].register_forward_hook(copy_tap(tap, k)) for k, tap in enumerate(spec.taps)]
        try:
            output = self._decoder(
                input_ids=torch.from_numpy(tokens).to(self._device)[None],
                position_ids=torch.from_numpy(positions).to(self._device)[None],
                use_cache=False,
                packed=packed,
            )
            for view, (start, end) in zip(views, pairwise(rows), strict=True):
                if spec.final:
                    view["final"].copy_(output.last_hidden_state[0, start:end])
        except _LastTap:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if not packed.seen:
            raise TargetError(
                f"target {self._name}: its attention ignores packed sequences; it cannot be a target here"
            )
        return Launched(self._device) if self._device.type == "cuda" else None

    def _use_threads(self) -> None:
        # OpenMP keeps its thread count per calling thread, so it is set where the forwards run.
        if self._threads > 0 and self._thread != threading.get_ident():
            torch.set_num_threads(self._threads)
            self._thread = threading.get_ident()


def _refuse_unpackable(name: str, network: PreTrainedModel) -> None:
    kinds = set(getattr(network.config.get_text_config(), "layer_types", None) or ())
    if strange := kinds - {"full_attention", "sliding_attention"}:
        raise TargetError(
            f"target {name}: its layers of kind {', '.join(sorted(strange))} cannot run packed sequences; "
            f"expected full or sliding attention"
        )


def _use_grouped_experts(network: PreTrainedModel) -> None:
    """Mixture-of-experts layers as one grouped matmul. Needs compute capability 8.0 on CUDA."""
    if not hasattr(network.config.get_text_config(), "num_experts_per_tok"):
        return
    grouped = network.device.type == "cpu" or torch.cuda.get_device_capability(network.device) >= (8, 0)
    if hasattr(network, "set_experts_implementation"):
        network.set_experts_implementation("grouped_mm" if grouped else "eager")
    else:
        logger.warning("this transformers has no set_experts_implementation: experts run one by one; update it")


def _artifact_tensors(network: PreTrainedModel) -> dict[str, torch.Tensor]:
    model: Any = network  # its getters are untyped
    embedding: torch.Tensor = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    return {"embedding": embedding, "lm_head": embedding if head is None else head.weight}
