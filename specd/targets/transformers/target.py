"""The transformers backend: packed sequences through the backbone, each tap copied by a hook straight into its slot."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any, ClassVar, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AttentionInterface, PreTrainedModel

from specd.config.settings import TargetConfig
from specd.errors import SpecdError, TargetError, first_line
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.payload import Payload
from specd.targets.artifacts import Artifacts
from specd.targets.base import CaptureJob, Launched, SlotRows, check, recurrent, slot_rows, slot_tensors
from specd.targets.digest import dummy_digest, weights_digest
from specd.targets.quiet import no_warnings
from specd.targets.source import Source, dummy_config, resolve, with_tokenizer
from specd.targets.transformers import trial
from specd.targets.transformers.images import Encoders
from specd.targets.transformers.layers import artifact_tensors, find_decoder, find_layers, residual, use_grouped_experts
from specd.targets.transformers.load import load_network
from specd.targets.transformers.packed_attention import ATTENTION, Packed, Unpackable, packed_attention
from specd.targets.transformers.rope import Rope
from specd.targets.transforms import measured

logger = logging.getLogger(__name__)


class _LastTap(Exception):
    """Ends a forward after its last tap; never leaves this module."""


class TransformersTarget:
    """A causal LM of transformers as a Target. Runs the decoder alone: no lm_head, no layer above the last tap.

    Sequences are packed into one forward where a trial at the start says that this changes nothing; else they run one
    by one, with the model's own attention. `alone` says why, empty where they are packed.
    Raises ConfigError or TargetError when the model cannot be loaded, or its layers cannot be tapped.
    """

    settings: ClassVar[frozenset[str]] = frozenset({"tokenizer", "trust_remote_code"})

    def __init__(self, config: TargetConfig) -> None:
        dummy = config.load_format == "dummy"
        need: Literal["shape", "weights"] = "shape" if dummy else "weights"
        source = with_tokenizer(resolve(config.model, need=need, code=config.trust_remote_code), config.tokenizer)
        try:
            network = load_network(
                source,
                dtype=config.dtype,
                device=config.device,
                load_format=config.load_format,
                num_layers=config.num_layers,
                trust_remote_code=config.trust_remote_code,
            )
        except torch.OutOfMemoryError as error:
            raise TargetError(
                f"target {source.name} does not fit in the memory of {config.device}: {error}; free some, take another "
                f"device (--device cuda:N) or a smaller dtype (--dtype bfloat16)"
            ) from None
        self._name = source.name
        self._threads = config.threads
        self._thread = 0
        self.alone = ""
        try:
            self._adopt(network, source, dummy_config(source, config.num_layers) if dummy else source.config, dummy)
            self._try_out(network)
        except SpecdError:
            raise
        except Exception as error:
            raise TargetError(
                f"target {source.name}: {type(network).__name__} of transformers does not run as a decoder of tokens "
                f"alone ({type(error).__name__}: {first_line(error)}); take another target, or try --backend sglang"
            ) from error

    def _adopt(self, network: PreTrainedModel, source: Source, published: dict[str, Any], dummy: bool) -> None:
        AttentionInterface.register(ATTENTION, packed_attention)
        use_grouped_experts(network)
        self._decoder: Any = find_decoder(network)
        text_config = network.config.get_text_config(decoder=True)
        self._layers = find_layers(self._decoder, text_config.num_hidden_layers, source.name)
        self._own_attention: str = self._decoder.config._attn_implementation
        self._has_window = _window(text_config.to_dict())
        self._rope = Rope(self._decoder)
        self._device = network.device
        self.device = str(network.device)
        tensors = artifact_tensors(network, source.name)
        self._artifacts = Artifacts(source, published, tensors)
        digest = dummy_digest(published, self._device.type) if dummy or not source.path else weights_digest(source.path)
        dtype = str(network.dtype).removeprefix("torch.")
        kind = str(source.config["model_type"])  # of a wrapper for images, too, as other backends have it
        self._encoders = Encoders(network, self._decoder)
        contract = self._artifacts.contract(source, text_config, kind, dtype, digest, measured(network))
        self.contract = msgspec.structs.replace(contract, payloads=self._encoders.names)

    def run(self, fills: Sequence[CaptureJob]) -> Launched | None:
        """See Target.run. One forward over all sequences of all fills; cost of attention is the sum of length²."""
        if self._decoder is None:
            raise TargetError(f"target {self._name} is closed")
        spec = check(self.contract, fills)
        self._use_threads()
        try:
            return self._run(fills, spec)
        except Unpackable as error:  # attention that shows what it wants with longer sequences only
            self._separate(error)
            return self._run(fills, spec)

    def _run(self, fills: Sequence[CaptureJob], spec: CaptureSpec) -> Launched | None:
        lengths = [int(length) for fill in fills for length in fill.lengths]
        brought = [each for fill in fills for each in fill.payloads or ({},) * fill.lengths.size]
        tokens = np.concatenate([fill.tokens for fill in fills]).astype(np.int64)
        on_gpu = self._device.type == "cuda"
        try:
            # Kernels that are not torch's own are launched on whatever device is current.
            with torch.inference_mode(), torch.cuda.device(self._device) if on_gpu else contextlib.nullcontext():
                begin = first = 0
                for packed in self._shares(lengths, brought):
                    self._forward(fills, spec, packed, tokens, begin, brought[first])
                    begin, first = begin + sum(packed), first + len(packed)
                return Launched(self._device) if on_gpu else None
        except (RuntimeError, ValueError, IndexError) as error:
            if on_gpu:
                # A CUDA fault poisons the process: only running out of memory leaves the target alive there, and
                # images of another shape than said, after which the device still answers.
                if not isinstance(error, torch.OutOfMemoryError) and not any(brought):
                    raise
                torch.cuda.synchronize(self._device)
            raise TargetError(
                f"target {self._name}: a forward of {tokens.size} tokens failed, {max(lengths)} in its longest "
                f"sequence: {error}"
            ) from error

    def _shares(self, lengths: Sequence[int], brought: Sequence[Payload]) -> list[list[int]]:
        """The lengths of the sequences of each forward, in order. brought: by each."""
        if self.alone:
            return [[length] for length in lengths]

        def packs(sequence: tuple[int, Payload]) -> bool:
            # Where frequencies follow from the length, only sequences that leave them alone may share a forward.
            return not sequence[1] and (not self._rope.limit or sequence[0] < self._rope.limit)

        shares: list[list[int]] = []
        for together, sequences in groupby(zip(lengths, brought, strict=True), packs):
            run = [length for length, _ in sequences]
            shares += [run] if together else [[length] for length in run]
        return shares

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
                output_hidden_states=True,
                **({} if self.alone else {"packed": Packed([tokens.size], self._device)}),
            )
        states = getattr(output, "hidden_states", None) or ()
        if len(states) != len(self._layers) + 1:
            return None
        # The first is the embedding's, the last is normed.
        return np.stack([rows[0].float().cpu().numpy() for rows in states[1:-1]])

    def close(self) -> None:
        """See Target.close."""
        self._decoder, self._layers = None, ()
        self._encoders.close()
        self._artifacts.close()

    def _try_out(self, network: PreTrainedModel) -> None:
        """Decide whether sequences may be packed, and compare the states with those of plain forwards."""
        exact = self.contract.dtype == "float32"
        settings = network.config.get_text_config(decoder=True).to_dict()
        known = recurrent(settings) or _strange(settings)
        packed: list[trial.States] = []
        self._attend(ATTENTION)
        try:
            packed = [self._states(trial.FIRST), self._states(trial.OTHER)]
        except Unpackable as error:
            self._separate(error)
        except Exception as error:  # noqa: BLE001  models raise what they like where they know no packing
            self._separate(Unpackable(f"it takes no packed sequences ({first_line(error)})"))
        if known and packed:
            self._separate(Unpackable(known))
        behind = [states.final[len(trial.FIRST) :] for states in packed]
        why, self.alone = self.alone, "a trial"
        try:
            alone = self._compared(network, self._own_attention, exact)
        except TargetError:
            if self._own_attention == "eager":
                raise
            self._own_attention = "eager"  # some models mask their tokens there alone
            alone = self._compared(network, self._own_attention, exact)
            why = why or "its attention is right in transformers' eager form alone"
        self.alone = why
        if why:
            return
        # A mixture of experts may round differently: what its experts multiply depends on all tokens.
        limit = float(behind[0].abs().max()) * (1e-5 if exact else 3e-2)
        if not torch.allclose(behind[0], behind[1], rtol=0, atol=limit, equal_nan=True):
            self._separate(Unpackable("a sequence changes the states of the one packed behind it"))
        elif not all(
            trial.near(getattr(packed[0], key), getattr(alone, key), exact=exact) for key in ("taps", "final")
        ):
            self._separate(Unpackable("packed into one forward, sequences have other states than alone"))
        else:
            self._attend(ATTENTION)

    def _compared(self, network: PreTrainedModel, attention: str, exact: bool) -> trial.States:
        """The states of the two sequences, one by one. Raises TargetError where plain forwards have other ones."""
        self._attend(attention)
        expected = [
            trial.plain(network, self._ids(part), self.contract.num_layers, self._name)
            for part in (trial.FIRST, trial.SECOND)
        ]
        taps, final = (torch.cat([getattr(part, key) for part in expected]) for key in ("taps", "final"))
        alone = self._states(trial.FIRST)
        trial.check_taps(alone, trial.States(taps, final), exact=exact, name=self._name)
        return alone

    def _states(self, first: Sequence[int]) -> trial.States:
        """The states of a sequence and of trial.SECOND behind it, as a trainer gets them: of all layers, in float32."""
        spec = CaptureSpec(taps=tuple(range(self.contract.num_layers - 1)), final=True, dtype="float32")
        lengths = np.array([len(first), len(trial.SECOND)], dtype=np.int32)
        tokens = np.array([*self._ids(first), *self._ids(trial.SECOND)], dtype=np.int32)
        layout = slot_layout(spec, self.contract.hidden_size, tokens.size)
        slot = torch.empty(layout.nbytes, dtype=torch.uint8, device=self._device)
        job = CaptureJob(tokens=tokens, lengths=lengths, spec=spec, layout=layout, slot=slot)
        self._use_threads()
        if (completion := self._run([job], check(self.contract, [job]))) is not None:
            completion.wait()
        found = slot_tensors(job)
        return trial.States(found.get("taps", found["final"].new_empty(tokens.size, 0, 0)), found["final"])

    def _ids(self, tokens: Sequence[int]) -> list[int]:
        return [token % self.contract.vocab_size for token in tokens]

    def _separate(self, why: Unpackable) -> None:
        self.alone = str(why)
        if why.eager:
            self._own_attention = "eager"
        logger.warning("%s: %s, so its sequences run one by one, not packed into one forward", self._name, self.alone)
        self._attend(self._own_attention)

    def _attend(self, attention: str) -> None:
        """Let the decoder's layers use `attention` of transformers, as far as they use its interface at all."""
        with no_warnings():
            self._decoder.set_attn_implementation(attention)

    @contextlib.contextmanager
    def _own(self) -> Iterator[None]:
        """The model's own attention, for what is not packed."""
        if not self.alone:
            self._attend(self._own_attention)
        try:
            yield
        finally:
            if not self.alone:
                self._attend(ATTENTION)

    def _forward(
        self,
        fills: Sequence[CaptureJob],
        spec: CaptureSpec,
        lengths: Sequence[int],
        tokens: NDArray[np.int64],
        begin: int,
        brought: Payload,
    ) -> None:
        """One forward of packed sequences, the tokens from `begin` on, and the copies of its states.

        brought: by its one sequence beside its tokens.
        """
        packed = Packed(lengths, self._device)
        size = packed.bounds[-1]
        positions = np.concatenate([np.arange(length, dtype=np.int64) for length in lengths])
        rows = accumulate((int(fill.tokens.size) for fill in fills), initial=0)
        views: list[tuple[SlotRows, slice, slice]] = []
        """A slot's rows, and which of their rows are which of this forward's."""
        for fill, (start, end) in zip(fills, pairwise(rows), strict=True):
            low, high = max(start, begin), min(end, begin + size)
            if low < high:
                views.append((slot_rows(fill), slice(low - start, high - start), slice(low - begin, high - begin)))
        stop_after = -1 if spec.final or not spec.taps else spec.taps[-1]

        def copy_tap(tap: int, index: int) -> Callable[..., None]:
            def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
                hidden_TH = residual(output, self._name)
                for view, into, of in views:
                    view.taps[index][into].copy_(hidden_TH[of])
                if tap == stop_after:
                    raise _LastTap

            return hook

        self._rope.reset()
        # Alone, a sequence is given as a user of transformers would: no positions, no packing.
        alone = bool(self.alone or brought)
        how = {} if alone else {"position_ids": torch.from_numpy(positions).to(self._device)[None], "packed": packed}
        handles = [self._layers[tap].register_forward_hook(copy_tap(tap, k)) for k, tap in enumerate(spec.taps)]
        ids = torch.from_numpy(tokens[begin : begin + size]).to(self._device)[None]
        try:
            if brought:
                with self._own():
                    output = self._encoders.run(ids, brought)
            else:
                output = self._decoder(input_ids=ids, use_cache=False, **how)
            for view, into, of in views:
                if view.final is not None:
                    view.final[into].copy_(output.last_hidden_state[0, of])
        except _LastTap:
            return  # perhaps below the first layer with attention
        finally:
            for handle in handles:
                handle.remove()
        if not packed.seen and not alone:
            raise Unpackable("its attention ignores how sequences are packed")
        if self._has_window and not packed.windowed and not alone:
            raise Unpackable("its attention has a window in its mask alone")

    def _use_threads(self) -> None:
        # OpenMP keeps its thread count per calling thread, so it is set where the forwards run.
        if self._threads > 0 and self._thread != threading.get_ident():
            torch.set_num_threads(self._threads)
            self._thread = threading.get_ident()


def _window(settings: dict[str, Any]) -> bool:
    """Whether layers see so many tokens back alone."""
    kinds = settings.get("layer_types")
    used = settings.get("use_sliding_window", True) and (not kinds or "sliding_attention" in kinds)
    return bool(settings.get("sliding_window") and used)


def _strange(settings: dict[str, Any]) -> str:
    """Why attention of another kind than causal, with a window or without, cannot run packed sequences; or nothing."""
    kinds = {str(kind) for kind in settings.get("layer_types") or ()}
    known = {"full_attention", "sliding_attention", "attention"}
    strange = sorted(kind for kind in kinds - known if kind.endswith("attention"))
    return f"it has layers of kind {', '.join(strange)}" if strange else ""
