"""What is cut out of a slot is, to the byte, what a slot of one's own would hold."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec, StateDtype, covers, union
from specd.protocol.cut import Piece, cut, gather


def specs(dtype: StateDtype) -> st.SearchStrategy[CaptureSpec]:
    return st.builds(
        lambda taps, final: CaptureSpec(taps=tuple(sorted(taps)), final=final or not taps, dtype=dtype),
        st.sets(st.integers(0, 7)), st.booleans(),
    )  # fmt: skip


members_of_one_dtype = st.sampled_from(["bfloat16", "float8_e4m3fn"]).flatmap(
    lambda dtype: st.lists(specs(cast(StateDtype, dtype)), min_size=1, max_size=4)
)


def filled(spec: CaptureSpec, hidden: int, tokens: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """A slot where every element tells its layer, token and place; the bytes between tensors are 0."""
    layout = slot_layout(spec, hidden, tokens)
    slot = np.zeros(layout.nbytes, np.uint8)
    for ref in layout.tensors:
        layers = spec.taps if ref.name.startswith("taps") else (99,)
        if ref.dtype == "float32":
            layer, token = np.ogrid[: len(layers), :tokens]
            values = (100 * token + np.array(layers)[layer]).astype("<f4")
        else:
            token, layer, place = np.ogrid[:tokens, : len(layers), :hidden]
            values = (100 * token + np.array(layers)[layer] + 7 * place).astype("<u1" if spec.scaled else "<u2")
        slot[ref.offset : ref.offset + ref.nbytes] = values.view(np.uint8).ravel()
    return slot


@given(members_of_one_dtype, st.integers(1, 3), st.integers(1, 300), st.data())
def test_a_cut_of_a_union_is_the_own_layout(
    members: list[CaptureSpec], hidden: int, tokens: int, data: st.DataObject
) -> None:
    held, own = union(members), members[0]
    slot, expected = filled(held, hidden, tokens), filled(own, hidden, tokens)
    pieces = cut(held, own, hidden, tokens)
    assert (pieces == ()) == (held == own)
    assert len(pieces) <= (len(own.taps) + own.final) * (1 + own.scaled)
    if pieces:
        begin = data.draw(st.integers(0, expected.size - 1))
        end = data.draw(st.integers(begin + 1, expected.size))
        assert bytes(gather(slot.data, pieces, begin, end)) == expected[begin:end].tobytes()


def test_adjacent_taps_are_one_piece_and_all_taps_one_row() -> None:
    held = CaptureSpec(taps=(1, 3, 5, 7), final=True)
    assert cut(held, CaptureSpec(taps=(1, 5, 7)), 4, 10) == (Piece(0, 0, 10, 8, 32, 24), Piece(16, 8, 10, 16, 32, 24))
    assert cut(held, CaptureSpec(taps=(1, 3, 5, 7)), 4, 10) == (Piece(0, 0, 1, 320, 320, 320),)
    assert cut(held, CaptureSpec(taps=(), final=True), 4, 10) == (Piece(4096, 0, 1, 80, 80, 80),)


@pytest.mark.parametrize("own", [CaptureSpec(taps=(2,)), CaptureSpec(taps=(1,), dtype="float32")])
def test_what_is_not_there_cannot_be_cut(own: CaptureSpec) -> None:
    held = CaptureSpec(taps=(1, 3))
    assert not covers(held, own)
    with pytest.raises(ValueError, match="cannot be cut out"):
        cut(held, own, 4, 10)


def test_dtypes_have_no_union() -> None:
    with pytest.raises(ValueError, match="bfloat16, float32"):
        union([CaptureSpec(taps=(1,)), CaptureSpec(taps=(1,), dtype="float32")])
