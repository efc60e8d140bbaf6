"""What the transport benchmark moves: a sweep of sizes, and real batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from specd.bench.transport.lanes import MIB, DevicePair
from specd.protocol.batch import slot_bytes
from specd.protocol.capture import CaptureSpec

SWEEP: Final = (4096, 64 << 10, MIB, 16 * MIB, 64 * MIB, 256 * MIB)
LARGEST: Final = 1 << 30
"""The sweep ends here where a GPU takes part, at 256 MiB where none does."""
_FIVE_TAPS: Final = CaptureSpec(taps=(1, 12, 23, 34, 45))
_THREE_TAPS: Final = CaptureSpec(taps=(1, 23, 44), final=True)
SHAPES: Final = {
    "3 taps + final, 3,072 tokens": slot_bytes(_THREE_TAPS, 2048, 3072),
    "5 taps, 3,072 tokens": slot_bytes(_FIVE_TAPS, 2048, 3072),
    "5 taps, 12,288 tokens": slot_bytes(_FIVE_TAPS, 2048, 12288),
}
"""Real batches of a target with 48 layers of 2,048, bfloat16: five taps; three taps and the final state."""


def sizes(placement: DevicePair, asked: Sequence[int]) -> list[tuple[int, str]]:
    """Bytes of each row of a placement, and the shape they stand for, if any. asked: bytes, the default when empty."""
    if asked:
        return [(size, "") for size in asked]
    sweep = SWEEP if placement.daemon == "cpu" else (*SWEEP, LARGEST)
    return [*((size, "") for size in sweep), *((size, shape) for shape, size in SHAPES.items())]
