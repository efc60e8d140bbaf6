"""The trial of a target before it serves: states that are no numbers, dead, alike, mixed up or of another layer.

A fault is named with the lowest layer that shows it. Shape legend: K layers and the final state, T tokens, H hidden.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Final, Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.errors import TargetError
from specd.memory import device_arena
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob, Target

logger = logging.getLogger(__name__)

EXACT: Final = 1e-4
"""Largest difference of a row from its other computation, relative to its norm: float32 on the CPU, no row above it.
Kernels sum in another order for other shapes: SmolLM2's 30 layers differ by 5e-6. (A GPU may take TF32 for float32.)"""

ROUNDED: Final = 3e-2
"""The same for narrower dtypes and on GPUs, where it is logged. It refuses where nothing but attention brings rows
together and both forwards have one shape, hence the same kernels: dense layers that are not quantised."""

WRONG: Final = 0.5
"""What refuses everywhere. Not measured yet for FP8 (a scale a tensor depends on all rows) and for mixtures of experts
in bfloat16 (near a tie a row may take another expert) on GPUs, so it is far from what they may do."""

GRACE: Final = 2
"""Rows of 8 that may differ by more than ROUNDED or WRONG: a router's tie is no fault of the whole target."""

_FIRST, _SECOND = 3, 5
"""Tokens of the two sequences that are packed."""
_Rows = NDArray[np.float32]


@runtime_checkable
class Witness(Protocol):
    """A target that has the states of its layers by another way than the hooks of `run`, too."""

    def plain_states(self, tokens: NDArray[np.int32]) -> NDArray[np.float32] | None:
        """The outputs of all layers but the last for one sequence, float32 [L − 1, T, H]; None if it cannot tell."""
        ...


class _Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What refuses a target. same: between forwards of one shape. other: of different ones. rows: how many may be off.

    plain: of a layer's states from their other way.
    """

    same: float
    other: float
    rows: int
    plain: float


def try_out(target: Target) -> None:
    """Run some sequences of a few tokens, merged and apart. Raises TargetError for states that cannot be right."""
    tokens = _draw(target.contract.vocab_size, 2 * _FIRST + _SECOND)
    first, stranger, second = np.split(tokens, (_FIRST, 2 * _FIRST))
    trial, bounds = _Trial(target), _bounds(target)
    merged = trial.run([first], [second])
    trial.look(merged, np.concatenate([first, second]))
    again = trial.run([first, second])
    trial.compare(merged, again, bounds.same, bounds.rows, "differ between two forwards of the same tokens")
    exchanged = trial.run([stranger, second])
    trial.compare(
        merged[:, _FIRST:], exchanged[:, _FIRST:], bounds.same, bounds.rows,
        "of a sequence change with the one packed before it",
    )  # fmt: skip
    alone = trial.run([second])
    trial.compare(
        merged, np.concatenate([trial.run([first]), alone], axis=1), bounds.other, bounds.rows,
        "differ between sequences in one forward and in one each",
    )  # fmt: skip
    if isinstance(target, Witness) and (plain := target.plain_states(second)) is not None:
        trial.match(alone[: len(plain)], plain, bounds.plain)
    logger.info("%s: states of %d layers are sound; they differ by up to %.1g", trial.name, trial.depth, trial.largest)


class _Trial:
    """Forwards of a target with all its layers captured, and what is seen in them. largest: relative difference."""

    def __init__(self, target: Target) -> None:
        contract = target.contract
        self._target = target
        self._hidden = contract.hidden_size
        self.name = f"target {contract.model}"
        self.depth = contract.num_layers
        self.largest = 0.0
        # float32 holds every dtype, so that nothing is rounded on its way here.
        self._spec = CaptureSpec(taps=tuple(range(contract.num_layers - 1)), final=True, dtype="float32")

    def run(self, *fills: Sequence[NDArray[np.int32]]) -> _Rows:
        """One forward of fills, a list of sequences each: [K, T, H] of all rows, in order."""
        jobs = [self._job(sequences) for sequences in fills]
        if (completion := self._target.run(jobs)) is not None:
            completion.wait()
        return np.concatenate([self._read(job) for job in jobs], axis=1)

    def look(self, states: _Rows, tokens: NDArray[np.int32]) -> None:
        """Refuse rows with NaN or infinities, rows of zeros, and equal rows of different tokens."""
        different = tokens[:, None] != tokens[None, :]
        for layer, rows in enumerate(states):
            broken = ~np.isfinite(rows).all(axis=1)
            dead = ~rows.any(axis=1)
            alike = ((rows[:, None] == rows[None, :]).all(axis=2) & different).any(axis=1)
            for which, what, remedy in (
                (broken, "hold NaN or infinities", "check its weights, or take --dtype bfloat16 or float32"),
                (dead, "are all zero", "check its weights, or take another --backend"),
                (alike, "are the same for different tokens", "check its weights, or take another --backend"),
            ):
                if which.any():
                    raise TargetError(
                        f"{self.name}: the states {self._place(layer)} {what} in {int(which.sum())} of {which.size} "
                        f"rows of a trial; {remedy}"
                    )

    def compare(self, states: _Rows, others: _Rows, bound: float, grace: int, what: str) -> None:
        """Refuse states with more than `grace` rows that differ by more than `bound`. Warns above ROUNDED."""
        distance = _distance(states, others)
        self.largest = max(self.largest, float(distance.max()))
        for limit in (bound, ROUNDED):
            if not (off := (distance > limit).sum(axis=1) > grace).any():
                continue
            layer = int(off.argmax())
            seen = f"the states {self._place(layer)} {what}, by up to {float(distance[layer].max()):.2g} of their norm"
            if limit == bound:
                raise TargetError(f"{self.name}: {seen}, expected at most {bound:.2g}; take another --backend")
            logger.warning("%s: %s, expected at most %.2g; --exact gives each batch a forward", self.name, seen, limit)
            return

    def match(self, states: _Rows, plain: NDArray[np.float32], bound: float) -> None:
        """Refuse taps that hold another layer's states. plain: those of the layers by another way."""
        if plain.shape != states.shape:
            logger.info("%s: its layers cannot be told apart: %s states, %s", self.name, plain.shape, states.shape)
            return
        for layer, rows in enumerate(states):
            # To every layer, [K]: the mean over rows.
            distance = _distance(np.broadcast_to(rows, plain.shape), plain).mean(axis=1)
            nearest = int(distance.argmin())
            if distance[layer] > bound and distance[nearest] < distance[layer] / 2:
                raise TargetError(
                    f"{self.name}: the states captured as layer {layer}'s are those of layer {nearest}; take another "
                    f"--backend"
                )

    def _job(self, sequences: Sequence[NDArray[np.int32]]) -> CaptureJob:
        lengths = np.array([part.size for part in sequences], dtype=np.int32)
        layout = slot_layout(self._spec, self._hidden, int(lengths.sum()))
        on_gpu = self._target.device != "cpu"
        slot: Any = (
            device_arena.private_memory(layout.nbytes, self._target.device)
            if on_gpu
            else memoryview(bytearray(layout.nbytes))
        )
        tokens = np.concatenate(sequences)
        return CaptureJob(tokens=tokens, lengths=lengths, spec=self._spec, layout=layout, slot=slot)

    def _read(self, job: CaptureJob) -> _Rows:
        slot = job.slot if isinstance(job.slot, memoryview) else job.slot.cpu().numpy().data
        found: list[_Rows] = []
        for ref in job.layout.tensors:
            rows = np.frombuffer(slot, np.float32, count=math.prod(ref.shape), offset=ref.offset)
            found.append(rows.reshape(job.tokens.size, -1, self._hidden).swapaxes(0, 1))
        return np.concatenate(found)

    def _place(self, layer: int) -> str:
        return f"after layer {layer}" if layer < self.depth - 1 else "after the final norm"


def _draw(vocabulary: int, count: int) -> NDArray[np.int32]:
    """Different tokens, if there are so many: of the vocabulary's middle, because special ones at its ends may rest at
    zero."""
    return (vocabulary * np.linspace(0.2, 0.6, count)).astype(np.int32)


def _distance(states: _Rows, others: _Rows) -> NDArray[np.float64]:
    """Of each row from its other, relative to the other's norm: [K, T]. infinite where only one is a number."""
    exact, other = states.astype(np.float64), others.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.linalg.norm(exact - other, axis=2) / np.linalg.norm(other, axis=2)
    result: NDArray[np.float64] = np.nan_to_num(found, nan=np.inf)
    return result


def _bounds(target: Target) -> _Bounds:
    if target.device == "cpu" and target.contract.dtype == "float32":
        return _Bounds(same=EXACT, other=EXACT, rows=0, plain=EXACT)
    config = msgspec.json.decode(bytes(target.artifact("config.json")))
    together = any(
        key == "quantization_config" or "expert" in key
        for part in (config, config.get("text_config") or {})
        for key in part
        if part[key]
    )
    return _Bounds(same=WRONG if together else ROUNDED, other=WRONG, rows=GRACE, plain=2**-7)  # bfloat16's step
