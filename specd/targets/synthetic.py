"""A target without a model: states are a hash of token, position, layer and hidden index. For tests and benchmarks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from specd.config.load import convert
from specd.config.settings import Config, TargetConfig
from specd.errors import ConfigError, TargetError, TransportError
from specd.memory import cuda
from specd.protocol.batch import TensorRef, slot_layout
from specd.protocol.capture import DTYPE_BYTES, PlainDtype
from specd.protocol.contract import ArtifactRef, TargetContract
from specd.targets.base import CaptureJob, Launched, slot_rows

if TYPE_CHECKING:
    import torch

_CHUNK_BYTES = 1 << 20  # float32 scratch per step: small enough to stay in the L2 cache
_DEVICE_CHUNK_BYTES = 64 << 20  # the same on a GPU, where a step costs its launches
_EMBEDDING, _LM_HEAD = 1 << 20, 1 << 21  # numbers no layer has, for the artifacts' hash
_ARTIFACT_SCALE = 0.035  # uniform in [-scale, scale) has the standard deviation 0.02 of a fresh embedding

_U32 = NDArray[np.uint32]
T = TypeVar("T")


class SyntheticConfig(Config, kw_only=True, frozen=True):
    """The options of a model string like `synthetic:hidden=64,layers=8,vocab=512,ms=20`.

    ms, us_per_token: how long a forward sleeps, per forward and per token. seed: of the states' hash.
    """

    hidden: int = 64
    layers: int = 8
    vocab: int = 512
    ms: float = 0.0
    us_per_token: float = 0.0
    seed: int = 0


class SyntheticTarget:
    """A Target with a configured cost. It sleeps that long, so that a trainer can use the CPU meanwhile.

    Its device is the CPU unless the configuration names a GPU, whose states have the same bits.
    Raises ConfigError for a model string with unknown or impossible options, or a missing device.
    """

    def __init__(self, config: TargetConfig) -> None:
        self._options = options = _parse(config.model)
        self.device = _pick_device(config.device)
        dtype: PlainDtype = "float32" if config.dtype == "auto" else config.dtype
        layers = config.num_layers or options.layers
        self._config_json = json.dumps(_published(options, layers, dtype), indent=2).encode()
        self._artifacts: dict[str, memoryview] = {}  # computed when they are first asked for
        shape = (options.vocab, options.hidden)
        weights = ArtifactRef(nbytes=options.vocab * options.hidden * DTYPE_BYTES[dtype], shape=shape, dtype=dtype)
        self.contract = TargetContract(
            model="synthetic",
            model_type="synthetic",
            hidden_size=options.hidden,
            num_layers=layers,
            vocab_size=options.vocab,
            dtype=dtype,
            weights=f"synthetic-{options.seed}",
            artifacts={
                "config.json": ArtifactRef(nbytes=len(self._config_json)),
                "embedding": weights,
                "lm_head": weights,
            },
        )

    def run(self, fills: Sequence[CaptureJob]) -> Launched | None:
        """See Target.run. Sleeps first, then writes."""
        spec, num_tokens = fills[0].spec, sum(int(fill.tokens.size) for fill in fills)
        if (problem := spec.problem(self.contract.num_layers)) is not None:
            raise TargetError(f"synthetic target: {problem}")
        for fill in fills:
            size = int(fill.tokens.size)
            if fill.spec != spec or fill.layout != slot_layout(spec, self._options.hidden, size):
                raise TargetError(f"synthetic target: the slot's layout is not that of {size} tokens of {spec}")
            if size == 0 or int(fill.lengths.sum()) != size or int(fill.lengths.min(initial=1)) < 1:
                raise TargetError(f"synthetic target: {fill.lengths.size} lengths do not cover {size} tokens")
            if not 0 <= int(fill.tokens.min()) <= int(fill.tokens.max()) < self._options.vocab:
                raise TargetError(f"synthetic target: token ids leave the vocabulary 0…{self._options.vocab - 1}")
        time.sleep(self._options.ms / 1e3 + self._options.us_per_token * num_tokens / 1e6)
        for fill in fills:
            positions = np.concatenate([np.arange(length, dtype=np.uint32) for length in fill.lengths])
            row = self._rows(fill.tokens.astype(np.uint32), positions)
            if spec.scaled:
                self._encode(fill, row)
                continue
            for ref in fill.layout.tensors:
                column = self._columns(spec.taps if ref.name == "taps" else (self.contract.num_layers,))
                if self.device == "cpu":
                    _write(fill.slot, ref, row, column, 1.0)
                else:
                    _write_on_device(fill.slot, ref, row, column)
        on_gpu = self.device != "cpu" and fills[0].slot.is_cuda
        return Launched(fills[0].slot.device) if on_gpu else None

    def plain_states(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """See trial.Witness."""
        hidden = self._options.hidden
        row = self._rows(tokens.astype(np.uint32), np.arange(tokens.size, dtype=np.uint32))
        states = np.empty((self.contract.num_layers - 1, tokens.size, hidden), np.float32)
        ref = TensorRef(name="layer", offset=0, shape=(tokens.size, hidden), dtype="float32")
        for layer, out in enumerate(states):
            _write(out.data.cast("B"), ref, row, self._columns((layer,)), 1.0)
        return states

    def artifact(self, name: str) -> memoryview:
        """See Target.artifact."""
        if name == "config.json":
            return memoryview(self._config_json)
        layer = {"embedding": _EMBEDDING, "lm_head": _LM_HEAD}[name]
        ref = self.contract.artifacts[name]
        if name in self._artifacts:
            return self._artifacts[name]
        data = bytearray(ref.nbytes)
        ids = np.arange(self._options.vocab, dtype=np.uint32)
        place = TensorRef(name=name, offset=0, shape=ref.shape, dtype=ref.dtype)
        row, column = self._rows(ids, np.zeros_like(ids)), self._columns((layer,))
        _write(memoryview(data), place, row, column, _ARTIFACT_SCALE)
        return self._artifacts.setdefault(name, memoryview(data).toreadonly())

    def close(self) -> None:
        """See Target.close."""

    def _encode(self, fill: CaptureJob, row: _U32) -> None:
        """The states of a float8 spec: those in the target's dtype, encoded."""
        import torch

        rows, dtype = slot_rows(fill), self.contract.dtype
        shape = (row.size, self._options.hidden)
        ref = TensorRef(name="layer", offset=0, shape=shape, dtype=dtype)
        states = torch.empty(ref.nbytes, dtype=torch.uint8, device=fill.slot.device if self.device != "cpu" else "cpu")
        for layer, out in zip((*fill.spec.taps, self.contract.num_layers), (*rows.taps, rows.final), strict=True):
            if out is None:
                continue
            if self.device == "cpu":
                _write(states.numpy().data, ref, row, self._columns((layer,)), 1.0)
            else:
                _write_on_device(states, ref, row, self._columns((layer,)))
            out.copy_(states.view(getattr(torch, dtype)).view(shape))

    def _rows(self, tokens: _U32, positions: _U32) -> _U32:
        """A hash of each (token, position)."""
        seed = np.uint32(self._options.seed & 0xFFFFFFFF)
        return _mix(tokens * np.uint32(0x9E3779B1) ^ _mix(positions + seed))

    def _columns(self, layers: Sequence[int]) -> _U32:
        """A hash of each (layer k, hidden index h), [k · h]."""
        layer = np.asarray(layers, dtype=np.uint32)[:, None] * np.uint32(0x85EBCA6B)
        return _mix(layer + np.arange(self._options.hidden, dtype=np.uint32)[None, :]).reshape(-1)


def _write(slot: memoryview, ref: TensorRef, row: _U32, column: _U32, scale: float) -> None:
    """One tensor of a slot: each value, uniform in [-scale, scale), is a hash of its row's and its column's."""
    stored = np.dtype(np.uint16) if ref.dtype == "bfloat16" else np.dtype(ref.dtype)
    out = np.frombuffer(slot, stored, count=row.size * column.size, offset=ref.offset).reshape(row.size, -1)
    step = max(1, _CHUNK_BYTES // (4 * column.size))
    for start in range(0, row.size, step):
        bits = row[start : start + step, None] ^ column
        bits *= np.uint32(0x9E3779B1)
        bits >>= np.uint32(9)
        bits |= np.uint32(0x40000000)  # a float32 in [2, 4)
        values = bits.view(np.float32)
        values -= np.float32(3)
        if scale != 1.0:
            values *= np.float32(scale)
        out[start : start + step] = _round_to_bfloat16(bits) if ref.dtype == "bfloat16" else values


def _write_on_device(slot: torch.Tensor, ref: TensorRef, row: _U32, column: _U32) -> None:
    """`_write` at scale 1, launched on the slot's device."""
    import torch

    dtype = getattr(torch, ref.dtype)
    out = slot[ref.offset : ref.offset + ref.nbytes].view(dtype).view(row.size, column.size)
    # int32 for uint32: products wrap alike, and after the shift only the bits that a signed one would spoil are cut.
    rows, columns = (torch.from_numpy(half.view(np.int32)).to(slot.device) for half in (row, column))
    step = max(1, _DEVICE_CHUNK_BYTES // (4 * column.size))
    for start in range(0, row.size, step):
        bits = rows[start : start + step, None] ^ columns
        bits *= 0x9E3779B1 - (1 << 32)
        bits >>= 9
        bits &= 0x007FFFFF
        bits |= 0x40000000
        values = bits.view(torch.float32)
        values -= 3.0
        out[start : start + step].copy_(values)


def _mix(value: _U32) -> _U32:
    """A bijective hash of 32-bit numbers."""
    value = (value ^ (value >> np.uint32(16))) * np.uint32(0x7FEB352D)
    value = (value ^ (value >> np.uint32(15))) * np.uint32(0x846CA68B)
    return value ^ (value >> np.uint32(16))


def _round_to_bfloat16(bits: _U32) -> NDArray[np.uint16]:
    """Upper halves of finite float32 bit patterns, rounded to nearest even; `bits` is used up."""
    bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    bits >>= np.uint32(16)
    return bits.astype(np.uint16)


def _pick_device(device: str) -> str:
    if device in ("auto", "cpu"):
        return "cpu"
    try:
        return f"cuda:{cuda.ordinal(cuda.resolve(device))}"
    except TransportError as error:
        raise ConfigError(f"device {device!r} of a synthetic target: {error}; use auto, cpu or cuda:N") from None


def synthetic_options(text: str, kind: type[T], what: str) -> T:
    """`synthetic:KEY=NUMBER,…` as `kind`. Raises ConfigError, which calls it `what`, for anything else."""
    name, _, options = text.partition(":")
    pairs = [item.partition("=") for item in options.split(",") if item]
    if name != "synthetic" or any(not equals for _, equals, _ in pairs):
        raise ConfigError(f"{what} {text!r}: expected synthetic:KEY=NUMBER,… like synthetic:ms=20,us_per_token=1.5")
    try:
        settings = {key.strip(): float(value) if "." in value else int(value) for key, _, value in pairs}
    except ValueError as error:
        raise ConfigError(f"{what} {text!r}: its options are numbers ({error})") from None
    return convert(settings, kind, f"{what} {text!r}")


def _parse(model: str) -> SyntheticConfig:
    options = synthetic_options(model, SyntheticConfig, "model")
    if min(options.hidden, options.layers - 1, options.vocab) < 1 or min(options.ms, options.us_per_token) < 0:
        raise ConfigError(f"model {model!r}: expected hidden ≥ 1, layers ≥ 2, vocab ≥ 1, ms ≥ 0, us_per_token ≥ 0")
    return options


def _published(options: SyntheticConfig, layers: int, dtype: str) -> dict[str, str | int | float | bool]:
    """A config.json a draft can be built from."""
    heads = next(count for count in (8, 4, 2, 1) if options.hidden % (2 * count) == 0 or count == 1)
    return {
        "model_type": "synthetic",
        "hidden_size": options.hidden,
        "intermediate_size": 2 * options.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": options.hidden // heads,
        "vocab_size": options.vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
