"""The Target protocol: a backend runs packed batches and writes their states straight into slots."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.errors import TargetError
from specd.protocol.batch import FINAL_SCALE, TAPS_SCALE, Layout, slot_layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract
from specd.protocol.payload import Array, Payload

if TYPE_CHECKING:
    import torch

    from specd.memory.fp8 import Rows


class CaptureJob(msgspec.Struct, frozen=True, kw_only=True):
    """One batch to capture and the slot to capture it into.

    tokens: int32 [T], lengths: int32 [B]. layout: where in the slot each tensor goes. slot: the slot's bytes, where the
    target computes: a uint8 tensor on its GPU, or a writable memoryview for a target on the CPU. payloads: what each
    sequence brings beside its tokens, () if none brings anything.
    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    spec: CaptureSpec
    layout: Layout
    slot: Any
    payloads: tuple[Payload, ...] = ()


class Completion(Protocol):
    """A pending write into slots (a device event)."""

    def wait(self) -> None:
        """Block the calling thread until every byte of the fills is in place."""


class Launched:
    """Completion of all work launched so far on the calling thread's current stream of a device."""

    __slots__ = ("_event",)

    def __init__(self, device: torch.device) -> None:
        import torch

        event: Any = torch.cuda.Event  # untyped
        # The waiter sleeps instead of spinning: a forward takes long.
        self._event = event(blocking=True)
        self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """See Completion.wait. Raises RuntimeError when the device failed."""
        self._event.synchronize()


class Target(Protocol):
    """A frozen LLM behind one backend. All methods but `artifact` are called from one thread.

    A registry entry points to a class, or a function, that takes a TargetConfig and returns one; its attribute
    `settings` names those of `registry.OWN` that it accepts. `specd.targets.suite` is the conformance suite.
    device: where its states are computed, `cpu` or a GPU with its number as in `cuda:0`; the ring lies there.
    """

    contract: TargetContract
    device: str

    def run(self, fills: Sequence[CaptureJob]) -> Completion | None:
        """Run one forward over all `fills` packed together and write each one's states into its slot.

        All fills share one CaptureSpec. Returns None when the bytes are in place, else what to wait for.
        Raises TargetError with the reason when this forward failed but the target survives; nothing writes to the
        slots after that.
        """

    def artifact(self, name: str) -> memoryview:
        """The raw bytes of one artifact the contract lists; thread-safe. Raises KeyError for any other name."""
        ...

    def close(self) -> None:
        """Free the target. Idempotent."""


_KINDS = ("layer_types", "layers_block_type", "block_types")
"""Keys of a config.json that list the kind of each layer."""
_RECURRENT = (
    "mamba_", "ssm_", "lru_", "rwkv", "conv_L_cache", "linear_attn", "linear_num_", "full_attention_interval",
    "hybrid_override_pattern",
)  # fmt: skip
"""How keys begin that only configs of targets with recurrent layers have; they count where no kinds are listed."""


def recurrent(config: Mapping[str, Any]) -> str:
    """What says that a target has recurrent layers; empty if nothing does. config: its config.json.

    Linear attention, Mamba, gated convolutions and their like carry a state from token to token, which sequences of one
    forward must not share.
    """
    for part in (config, config.get("text_config") or {}):
        listed = {str(kind) for key in _KINDS for kind in part.get(key) or ()}
        kinds = {kind for kind in listed if not kind.endswith("attention") or kind.startswith(("linear", "lightning"))}
        if found := sorted(kinds - {"mlp", "moe", "dense", "sparse"}):
            return f"layers of kind {', '.join(found)}"
        if 0 in (part.get("attn_type_list") or ()):  # MiniMax's: 0 is linear, 1 is softmax, in M2 throughout
            return "attn_type_list in its config.json"
        if not listed and (keys := sorted(key for key in part if key.startswith(_RECURRENT) and part[key])):
            return f"{keys[0]} in its config.json"
    return ""


def check(contract: TargetContract, fills: Sequence[CaptureJob]) -> CaptureSpec:
    """The one spec of all `fills`. Raises TargetError for fills that cannot share a forward, or do not fit the target.

    Checks lengths, token ids, payloads and layout, so that no bad batch faults on the device.
    """
    spec = fills[0].spec
    if (problem := spec.problem(contract.num_layers)) is not None:
        raise TargetError(f"target {contract.model}: {problem}")
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
        if low < 0 or high >= contract.vocab_size:
            raise TargetError(f"token ids {low}…{high} leave the vocabulary 0…{contract.vocab_size - 1}")
        if fill.payloads:
            _check_payloads(contract, fill)
        if fill.layout != slot_layout(spec, contract.hidden_size, size):
            raise TargetError(f"the slot's layout is not that of {size} tokens of {spec}")
    return spec


def _check_payloads(contract: TargetContract, fill: CaptureJob) -> None:
    if len(fill.payloads) != fill.lengths.size:
        raise TargetError(f"{len(fill.payloads)} payloads for {fill.lengths.size} sequences: expected one for each")
    if unknown := sorted({name for payload in fill.payloads for name in payload} - set(contract.payloads)):
        taken = ", ".join(contract.payloads) or "text alone"
        raise TargetError(
            f"a sequence brings {', '.join(unknown)}: target {contract.model} takes {taken}; leave them out, or host a "
            f"target, or by a backend, that takes them"
        )


def slot_tensors(fill: CaptureJob) -> dict[str, torch.Tensor]:
    """A slot's tensors, as views of the slot."""
    import torch

    from specd.memory.states import views

    slot = fill.slot if isinstance(fill.slot, torch.Tensor) else torch.frombuffer(fill.slot, dtype=torch.uint8)
    return views(slot, fill.layout)


class SlotRows(NamedTuple):
    """Where states are written, [T, H] each. taps: in the order of the spec. final: None where it is not captured.

    Each takes `copy_` and slices of its rows as a tensor does, and encodes what is written if the spec is float8.
    """

    taps: tuple[torch.Tensor | Rows, ...]
    final: torch.Tensor | Rows | None


def slot_rows(fill: CaptureJob) -> SlotRows:
    """The rows of a slot, for a target to write to."""
    from specd.memory.fp8 import Rows

    found = slot_tensors(fill)
    taps, final = found.get("taps"), found.get("final")
    each = () if taps is None else taps.unbind(1)
    if not fill.spec.scaled:
        return SlotRows(each, final)
    scales = found[TAPS_SCALE].unbind() if each else ()
    return SlotRows(tuple(map(Rows, each, scales)), None if final is None else Rows(final, found[FINAL_SCALE]))


def payload_tensor(array: Array) -> torch.Tensor:
    """An array of a payload as a tensor, a view of its bytes: never write to it."""
    import torch

    dtype: torch.dtype = getattr(torch, array.dtype)
    if not array.nbytes:
        return torch.empty(array.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(array.data, dtype=dtype).view(array.shape)


def patch_counts(grids: torch.Tensor, patches: int) -> list[int]:
    """Patches of each image by its frames, rows and columns [images, 3]; none unless they are `patches` in all.

    A product of 64 bits, or of negative numbers, would fit any count.
    """
    if grids.ndim != 2 or grids.shape[1] != 3 or grids.is_floating_point() or len(grids) > patches:
        return []
    found: list[list[int]] = grids.tolist()
    counts = [math.prod(each) for each in found if min(each) > 0]
    return counts if len(counts) == len(found) and sum(counts) == patches else []
