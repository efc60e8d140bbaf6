"""What is moved: a sweep, real batches, or what was asked for."""

from __future__ import annotations

from specd.bench.transport.lanes import placements
from specd.bench.transport.sizes import LARGEST, SHAPES, SWEEP, sizes


def test_the_real_batches_are_those_the_table_names() -> None:
    assert SHAPES == {
        "3 taps + final, 3,072 tokens": 3072 * 16_384,
        "5 taps, 3,072 tokens": 3072 * 20_480,
        "5 taps, 12,288 tokens": 12_288 * 20_480,
    }


def test_the_largest_size_needs_a_gpu() -> None:
    gpu, cpu = placements("all", 1)
    assert [size for size, shape in sizes(gpu, ()) if not shape] == [*SWEEP, LARGEST]
    assert [size for size, shape in sizes(cpu, ()) if not shape] == [*SWEEP]
    assert [shape for _, shape in sizes(cpu, ()) if shape] == [*SHAPES]
    assert sizes(gpu, [5, 7]) == [(5, ""), (7, "")]
