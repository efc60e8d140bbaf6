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
from numpy.typing import NDArray
from transformers import AttentionInterface, PreTrainedModel

from specd.config.settings import TargetConfig
from specd.errors import TargetError
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.artifacts import Artifacts
from specd.targets.base import CaptureJob, Launched, check, recurrent, slot_tensors
from specd.targets.digest import dummy_digest, weights_digest
from specd.targets.source import dummy_config, resolve, with_tokenizer
from specd.targets.transformers.load import load_network
from specd.targets.transformers.packed_attention import ATTENTION, Packed, packed_attention
from specd.targets.transforms import measured

logger = logging.getLogger(__name__)


class _LastTap(Exception):
    """Ends a forward after its last tap; never leaves this module."""


class TransformersTarget:
    """A causal LM of transformers as a Target. Runs the decoder alone: no lm_head, no layer above the last tap.

    Sequences are packed into one forward; where layers carry a state from token to token, they run one by one.
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
            source, network.config.get_text_config(), network.config.model_type, dtype, digest, measured(network)
        )
        self._one_by_one = False
        if why := recurrent(network.config.get_text_config().to_dict()):
            self._separate(why)
        self._try_out()

    def run(self, fills: Sequence[CaptureJob]) -> Launched | None:
        """See Target.run. One forward over all sequences of all fills; cost of attention is the sum of length²."""
        if self._decoder is None:
            raise TargetError(f"target {self._name} is closed")
        spec = check(self.contract, fills)
        self._use_threads()
        lengths = [int(length) for fill in fills for length in fill.lengths]
        tokens = np.concatenate([fill.tokens for fill in fills]).astype(np.int64)
        on_gpu = self._device.type == "cuda"
        try:
            # Kernels that are not torch's own are launched on whatever device is current.
            with torch.inference_mode(), torch.cuda.device(self._device) if on_gpu else contextlib.nullcontext():
                begin = 0
                for packed in [[length] for length in lengths] if self._one_by_one else [lengths]:
                    self._forward(fills, spec, packed, tokens, begin)
                    begin += sum(packed)
                return Launched(self._device) if on_gpu else None
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

    def plain_states(self, tokens: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """See trial.Witness: the hidden states that transformers itself gives."""
        on_gpu = self._device.type == "cuda"
        with torch.inference_mode(), torch.cuda.device(self._device) if on_gpu else contextlib.nullcontext():
            output = self._decoder(
                input_ids=torch.from_numpy(tokens.astype(np.int64)).to(self._device)[None],
                use_cache=False,
                packed=Packed([tokens.size], self._device),
                output_hidden_states=True,
            )
        states = getattr(output, "hidden_states", None) or ()
        if len(states) != len(self._layers) + 1:
            return None
        # The first is the embedding's, the last is normed.
        return np.stack([rows[0].float().cpu().numpy() for rows in states[1:-1]])

    def close(self) -> None:
        """See Target.close."""
        self._decoder, self._layers = None, ()
        self._artifacts.close()

    def _try_out(self) -> None:
        """Run two sequences, twice: a model that cannot be hosted fails at the start, and kernels are loaded.

        Only the first sequence differs: where the second one's states do as well, sequences must not be packed.
        """
        spec, lengths = CaptureSpec(taps=(), final=True, dtype="float32"), np.array([5, 3], dtype=np.int32)
        layout = slot_layout(spec, self.contract.hidden_size, int(lengths.sum()))
        second: list[torch.Tensor] = []
        for first in (1, 2):
            tokens = np.array([first] * 5 + [1, 2, 1], dtype=np.int32) % self.contract.vocab_size
            slot = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
            completion = self.run([CaptureJob(tokens=tokens, lengths=lengths, spec=spec, layout=layout, slot=slot)])
            if completion is not None:
                completion.wait()
            second.append(slot.view(torch.float32).view(-1, self.contract.hidden_size)[5:8])
        # A mixture of experts may round differently: what its experts multiply depends on all tokens.
        near = float(second[0].abs().max()) * (1e-5 if self.contract.dtype == "float32" else 3e-2)
        if not torch.allclose(second[0], second[1], rtol=0, atol=near, equal_nan=True):
            self._separate("a sequence changes the states of the one packed behind it")

    def _separate(self, why: str) -> None:
        logger.warning("%s: %s, so its sequences run one by one, not packed into one forward", self._name, why)
        self._one_by_one = True

    def _forward(
        self,
        fills: Sequence[CaptureJob],
        spec: CaptureSpec,
        lengths: Sequence[int],
        tokens: NDArray[np.int64],
        begin: int,
    ) -> None:
        """One forward of packed sequences, the tokens from `begin` on, and the copies of its states."""
        packed = Packed(lengths, self._device)
        size = packed.bounds[-1]
        positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
        rows = accumulate((int(fill.tokens.size) for fill in fills), initial=0)
        views: list[tuple[dict[str, torch.Tensor], slice, slice]] = []
        """A slot's tensors, and which of their rows are which of this forward's."""
        for fill, (start, end) in zip(fills, pairwise(rows), strict=True):
            low, high = max(start, begin), min(end, begin + size)
            if low < high:
                views.append((slot_tensors(fill), slice(low - start, high - start), slice(low - begin, high - begin)))
        stop_after = -1 if spec.final or not spec.taps else spec.taps[-1]

        def copy_tap(tap: int, index: int) -> Callable[..., None]:
            def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
                hidden_TH = (output[0] if isinstance(output, tuple) else output)[0]
                for view, into, of in views:
                    view["taps"][into, index].copy_(hidden_TH[of])
                if tap == stop_after:
                    raise _LastTap

            return hook

        handles = [self._layers[tap].register_forward_hook(copy_tap(tap, k)) for k, tap in enumerate(spec.taps)]
        try:
            output = self._decoder(
                input_ids=torch.from_numpy(tokens[begin : begin + size]).to(self._device)[None],
                position_ids=torch.from_numpy(positions).to(self._device)[None],
                use_cache=False,
                packed=packed,
            )
            for view, into, of in views:
                if spec.final:
                    view["final"][into].copy_(output.last_hidden_state[0, of])
        except _LastTap:
            return  # perhaps below the first layer with attention
        finally:
            for handle in handles:
                handle.remove()
        if not packed.seen:
            raise TargetError(
                f"target {self._name}: its attention ignores packed sequences; it cannot be a target here"
            )

    def _use_threads(self) -> None:
        # OpenMP keeps its thread count per calling thread, so it is set where the forwards run.
        if self._threads > 0 and self._thread != threading.get_ident():
            torch.set_num_threads(self._threads)
            self._thread = threading.get_ident()


def _refuse_unpackable(name: str, network: PreTrainedModel) -> None:
    """Raise TargetError for attention of another kind than causal, with a window or without."""
    kinds = set(getattr(network.config.get_text_config(), "layer_types", None) or ())
    known = {"full_attention", "sliding_attention", "linear_attention", "attention"}
    if strange := {kind for kind in kinds if kind.endswith("attention")} - known:
        raise TargetError(
            f"target {name}: its layers of kind {', '.join(sorted(strange))} cannot run packed sequences; "
            f"expected full, sliding or linear attention"
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
