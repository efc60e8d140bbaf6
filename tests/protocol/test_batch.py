"""Layout of a slot and identity of a batch."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from specd.protocol.batch import ALIGNMENT, Batch, Layout, TensorRef, batch_id, slot_bytes, slot_layout
from specd.protocol.capture import CaptureSpec

DFLASH = CaptureSpec(taps=(1, 12, 23, 34, 45))


def ints(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)


def test_taps_of_a_token_lie_side_by_side_and_final_follows_on_a_page() -> None:
    spec = CaptureSpec(taps=(1, 8), final=True, dtype="float32")
    assert slot_layout(spec, 576, 3) == Layout(
        tensors=(
            TensorRef(name="taps", offset=0, shape=(3, 2, 576), dtype="float32"),
            TensorRef(name="final", offset=16384, shape=(3, 576), dtype="float32"),  # 13,824 bytes of taps, rounded up
        ),
        nbytes=16384 + 6912,
    )


def test_scales_follow_what_they_are_of() -> None:
    spec = CaptureSpec(taps=(1, 8), final=True, dtype="float8_e4m3fn")
    assert slot_layout(spec, 576, 3) == Layout(
        tensors=(
            TensorRef(name="taps", offset=0, shape=(3, 2, 576), dtype="float8_e4m3fn"),
            TensorRef(name="taps_scale", offset=4096, shape=(2, 3), dtype="float32"),
            TensorRef(name="final", offset=8192, shape=(3, 576), dtype="float8_e4m3fn"),
            TensorRef(name="final_scale", offset=12288, shape=(3,), dtype="float32"),
        ),
        nbytes=12288 + 12,
    )


def test_what_is_not_captured_takes_no_room() -> None:
    only_final = slot_layout(CaptureSpec(taps=(), final=True), 8, 5)
    assert [tensor.name for tensor in only_final.tensors] == ["final"]
    assert (only_final.tensors[0].offset, only_final.nbytes) == (0, 80)
    assert [tensor.name for tensor in slot_layout(DFLASH, 8, 5).tensors] == ["taps"]


def test_bytes_of_the_design() -> None:
    assert slot_layout(DFLASH, 2048, 3072).nbytes == 62_914_560
    assert slot_bytes(DFLASH, 2048, 3072) == 62_914_560
    assert slot_bytes(DFLASH, 2048, 1) == 20_480
    assert slot_bytes(CaptureSpec(taps=(1,)), 8, 1) == ALIGNMENT


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    num_taps=st.integers(0, 8),
    final=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float8_e4m3fn"]),
    hidden_size=st.integers(1, 5000),
    num_tokens=st.integers(1, 5000),
)
def test_tensors_are_aligned_apart_and_inside(
    num_taps: int, final: bool, dtype: str, hidden_size: int, num_tokens: int
) -> None:
    spec = msgspec.convert({"taps": list(range(num_taps)), "final": final, "dtype": dtype}, CaptureSpec)
    layout = slot_layout(spec, hidden_size, num_tokens)
    end = 0
    for tensor in layout.tensors:
        assert tensor.offset % ALIGNMENT == 0
        assert end <= tensor.offset < end + ALIGNMENT
        end = tensor.offset + tensor.nbytes
    assert layout.nbytes == end
    assert sum(tensor.nbytes for tensor in layout.tensors) == spec.bytes_per_token(hidden_size) * num_tokens
    room = slot_bytes(spec, hidden_size, num_tokens)
    assert room % ALIGNMENT == 0
    assert end <= room < end + ALIGNMENT
    assert slot_layout(spec, hidden_size, max(1, num_tokens // 2)).nbytes <= room  # shorter batches fit too


def test_the_id_of_a_batch_is_pinned() -> None:
    """Daemon and trainer compute it apart: another value is another protocol version."""
    assert batch_id("llama:576", ints(5, 6, 7), ints(1, 2)).hex() == "2dc20bd13c9c6d31582aaf8a0cb41818"
    brought = batch_id("llama:576", ints(5, 6, 7), ints(1, 2), (b"", b"image"))
    assert brought.hex() == "d991970265dc7db8de0ed0a2b5c00959"


def test_the_id_tells_everything_apart_that_changes_the_states() -> None:
    base = batch_id("target", ints(5, 6, 7), ints(1, 2))
    assert len(base) == 16
    others = [
        batch_id("targe", ints(5, 6, 7), ints(1, 2)),
        batch_id("target", ints(5, 6, 8), ints(1, 2)),
        batch_id("target", ints(5, 6, 7), ints(2, 1)),
        batch_id("target", ints(5, 6, 7), ints(3)),
        batch_id("target", ints(5, 6), ints(7, 1, 2)),  # the same integers, cut elsewhere
        batch_id("target", ints(5, 6, 7), ints(1, 2), (b"image", b"")),
        batch_id("target", ints(5, 6, 7), ints(1, 2), (b"", b"image")),
        batch_id("target", ints(5, 6, 7), ints(1, 2), (b"other", b"")),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_the_id_does_not_depend_on_how_the_integers_are_kept() -> None:
    tokens = np.arange(10, dtype=np.int32)
    base = batch_id("target", tokens, ints(4, 6))
    assert batch_id("target", tokens.astype(">i4"), ints(4, 6)) == base
    assert batch_id("target", np.repeat(tokens, 2)[::2], ints(4, 6)) == base


def test_a_batch_counts_its_tokens() -> None:
    batch = Batch(tokens=ints(1, 2, 3), lengths=ints(3), loss_mask=np.ones(3, np.bool_), samples=(7,))
    assert batch.num_tokens == 3
