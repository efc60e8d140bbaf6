"""The transformers backend: packed sequences through the backbone, each tap copied by a hook straight into its slot."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, PreTrainedModel

from specd.capture import CaptureSpec
from specd.config import TargetConfig
from specd.errors import TargetError
from specd.packing import slot_layout
from specd.protocol import ArtifactRef, TargetContract
from specd.targets.base import Fill
from specd.targets.checkpoint import (
    TOKENIZER_FILES,
    Source,
    dummy_config,
    dummy_digest,
    load_network,
    resolve,
    weights_digest,
)
from specd.targets.packed_attention import ATTENTION, Packed, packed_attention

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _LastTap(Exception):
    """Ends a forward after its last tap; never leaves this module."""


class _Event:
    """Completion of one forward: what was launched up to its making."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        event: Any = torch.cuda.Event  # untyped
        self._event = event()
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class TransformersTarget:
    """A causal LM of transformers as a Target. Runs the decoder alone: no lm_head, no layer above the last tap.

    Raises ConfigError or TargetError when the model cannot be loaded, or cannot run packed sequences.
    """

    def __init__(self, config: TargetConfig) -> None:
        dummy = config.load_format == "dummy"
        source = resolve(config.model, need="shape" if dummy else "weights")
        network = load_network(
            source,
            dtype=config.dtype,
            device=config.device,
            load_format=config.load_format,
            num_layers=config.num_layers,
        )
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
        self._lock = threading.Lock()
        published = dummy_config(source, config.num_layers) if dummy else source.config
        self._files = _artifact_files(source, published)
        self._tensors = _artifact_tensors(network)
        self._bytes: dict[str, memoryview] = {}
        digest = dummy_digest(published, self._device.type) if dummy or not source.path else weights_digest(source.path)
        self.contract = _contract(source.name, network, digest, self._files, self._tensors)
        self._try_out()

    def run(self, fills: Sequence[Fill]) -> _Event | None:
        """See Target.run. One forward over all sequences of all fills; cost of attention is the sum of length²."""
        if self._decoder is None:
            raise TargetError(f"target {self._name} is closed")
        spec = self._check(fills)
        self._use_threads()
        lengths = [int(length) for fill in fills for length in fill.lengths]
        tokens = np.concatenate([fill.tokens for fill in fills]).astype(np.int64)
        positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
        try:
            with torch.inference_mode():
                return self._forward(fills, spec, Packed(lengths, self._device), tokens, positions)
        except RuntimeError as error:
            # A CUDA fault poisons the process: only running out of memory leaves the target alive there.
            if self._device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError):
                raise
            raise TargetError(f"target {self._name}: a forward of {tokens.size} tokens failed: {error}") from error

    def artifact(self, name: str) -> memoryview:
        """See Target.artifact. Weights on a GPU are copied to the host on the first call, and kept there."""
        with self._lock:
            if name in self._files:
                return memoryview(self._files[name])
            if name not in self._bytes:
                host = self._tensors[name].detach().cpu().contiguous()
                self._bytes[name] = host.view(-1).view(torch.uint8).numpy().data.toreadonly()
            return self._bytes[name]

    def close(self) -> None:
        """See Target.close."""
        with self._lock:
            self._decoder, self._layers = None, ()
            self._tensors, self._bytes = {}, {}

    def _try_out(self) -> None:
        """Run two one-token sequences: a model that cannot be hosted fails at the start, and kernels are loaded."""
        spec = CaptureSpec(taps=(), final=True, dtype="float32")
        layout = slot_layout(spec, self.contract.hidden_size, 2)
        tokens, lengths = np.zeros(2, dtype=np.int32), np.ones(2, dtype=np.int32)
        slot = memoryview(bytearray(layout.nbytes))
        completion = self.run([Fill(tokens=tokens, lengths=lengths, spec=spec, layout=layout, slot=slot)])
        if completion is not None:
            completion.wait()

    def _check(self, fills: Sequence[Fill]) -> CaptureSpec:
        spec = fills[0].spec
        if (problem := spec.problem(len(self._layers))) is not None:
            raise TargetError(f"target {self._name}: {problem}")
        for fill in fills:
            if fill.spec != spec:
                raise TargetError(f"one forward captures one spec, got {spec} and {fill.spec}: run them one by one")
            size = int(fill.tokens.size)
            if size == 0 or int(fill.lengths.min(initial=1)) < 1 or int(fill.lengths.sum()) != size:
                total = int(fill.lengths.sum())
                raise TargetError(
                    f"{fill.lengths.size} lengths sum to {total}: they must be ≥ 1 and cover all {size} tokens"
                )
            low, high = int(fill.tokens.min()), int(fill.tokens.max())
            if low < 0 or high >= self.contract.vocab_size:
                raise TargetError(f"token ids {low}…{high} leave the vocabulary 0…{self.contract.vocab_size - 1}")
            if fill.layout != slot_layout(spec, self.contract.hidden_size, size):
                raise TargetError(f"the slot's layout is not that of {size} tokens of {spec}")
        return spec

    def _forward(
        self, fills: Sequence[Fill], spec: CaptureSpec, packed: Packed, tokens: Any, positions: Any
    ) -> _Event | None:
        rows = tuple(accumulate((int(fill.tokens.size) for fill in fills), initial=0))
        views = [_Views(fill, self._device) for fill in fills]
        stop_after = -1 if spec.final or not spec.taps else spec.taps[-1]

        def copy_tap(tap: int, index: int) -> Callable[..., None]:
            def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
                hidden_TH = (output[0] if isinstance(output, tuple) else output)[0]
                for view, (start, end) in zip(views, pairwise(rows), strict=True):
                    view.device["taps"][:, index].copy_(hidden_TH[start:end])
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
                    view.device["final"].copy_(output.last_hidden_state[0, start:end])
        except _LastTap:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if not packed.seen:
            raise TargetError(
                f"target {self._name}: its attention ignores packed sequences; it cannot be a target here"
            )
        for view in views:
            view.flush()
        return _Event() if self._device.type == "cuda" else None

    def _use_threads(self) -> None:
        # OpenMP keeps its thread count per calling thread, so it is set where the forwards run.
        if self._threads > 0 and self._thread != threading.get_ident():
            torch.set_num_threads(self._threads)
            self._thread = threading.get_ident()


class _Views:
    """A slot's tensors. device: where hooks write, the slot itself unless it is host memory under a GPU target."""

    __slots__ = ("_host", "device")

    def __init__(self, fill: Fill, device: torch.device) -> None:
        slot = fill.slot if isinstance(fill.slot, torch.Tensor) else torch.frombuffer(fill.slot, dtype=torch.uint8)
        own = {
            ref.name: slot[ref.offset : ref.offset + ref.nbytes].view(_DTYPES[ref.dtype]).view(ref.shape)
            for ref in fill.layout.tensors
        }
        # Strided copies between device and host block the stream, so those slots are filled in one piece at the end.
        crosses = slot.device.type != device.type
        self._host = own if crosses else {}
        self.device = {name: torch.empty_like(view, device=device) for name, view in own.items()} if crosses else own

    def flush(self) -> None:
        for name, view in self._host.items():
            view.copy_(self.device[name], non_blocking=True)


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


def _artifact_files(source: Source, config: dict[str, Any]) -> dict[str, bytes]:
    files = {"config.json": json.dumps(config, indent=2).encode()}
    for name in TOKENIZER_FILES:
        if source.path is not None and (source.path / name).is_file():
            files[name] = (source.path / name).read_bytes()
    return files


def _artifact_tensors(network: PreTrainedModel) -> dict[str, torch.Tensor]:
    model: Any = network  # its getters are untyped
    embedding: torch.Tensor = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    return {"embedding": embedding, "lm_head": embedding if head is None else head.weight}


def _contract(
    name: str, network: PreTrainedModel, digest: str, files: dict[str, bytes], tensors: dict[str, torch.Tensor]
) -> TargetContract:
    config = network.config.get_text_config()
    artifacts = {file: ArtifactRef(nbytes=len(data)) for file, data in files.items()}
    tied = tensors["embedding"].data_ptr() == tensors["lm_head"].data_ptr()
    for key, tensor in tensors.items():
        artifacts[key] = ArtifactRef(
            nbytes=tensor.nbytes,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            same_as="embedding" if tied and key == "lm_head" else "",
        )
    template = files.get("chat_template.jinja", b"")
    if not template and "tokenizer_config.json" in files:
        inline = json.loads(files["tokenizer_config.json"]).get("chat_template")
        template = json.dumps(inline).encode() if inline else b""
    apart = {"config.json", "generation_config.json", "chat_template.jinja"}
    return TargetContract(
        model=name,
        model_type=network.config.model_type,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        dtype=str(network.dtype).removeprefix("torch."),
        weights=digest,
        tokenizer=_digest(*(data for file, data in sorted(files.items()) if file not in apart)),
        chat_template=_digest(template) if template else "",
        artifacts=artifacts,
    )


def _digest(*parts: bytes) -> str:
    """Digest of some files' bytes; empty for none."""
    if not parts:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
