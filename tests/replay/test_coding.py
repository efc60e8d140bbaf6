"""Cells of codes: what comes back is what the codes say, to the bit, and every batch of a slot fits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

import fake_cuda
from fills import rounded
from specd.memory.arena import HostArena
from specd.memory.cuda import Copier
from specd.memory.device_arena import DeviceArena
from specd.memory.states import views
from specd.protocol.batch import slot_bytes, slot_layout
from specd.protocol.capture import FP8, CaptureSpec, StateDtype
from specd.replay import coding
from specd.replay.coding import Coded, Coder
from specd.replay.form import offset
from specd.replay.pinned import Pinned, cells_in

HIDDEN, TOKENS = 48, 70
SPEC = CaptureSpec(taps=(1, 4, 6), final=True, dtype="float32")
SPECS = [
    SPEC,
    replace(SPEC, dtype="bfloat16"),
    CaptureSpec(taps=(2, 3), dtype="float16"),
    CaptureSpec(taps=(), final=True, dtype="bfloat16"),
]

Ring = HostArena | DeviceArena


@pytest.fixture(params=["cpu", "cuda:1"])
def ring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ring]:
    fake_cuda.install(monkeypatch)
    size = slot_bytes(SPEC, HIDDEN, TOKENS)
    found: Ring = (
        HostArena.create(2, size, None)
        if request.param == "cpu"
        else DeviceArena.create(2, size, request.param, None, mirrored=True)
    )
    with closing(found):
        if isinstance(found, DeviceArena):
            found.read_on_host(b"trainer", True)
        yield found


def coded_as(spec: CaptureSpec, tokens: int = TOKENS) -> Coded:
    found = Coded.of(spec, slot_layout(spec, HIDDEN, tokens))
    assert found is not None
    return found


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_loaded_is_what_the_codes_of_what_was_saved_say(ring: Ring, spec: CaptureSpec) -> None:
    coded, coder, copier = coded_as(spec), Coder(ring, HIDDEN, "float32"), Copier()
    nbytes = coded.states.nbytes
    ring.tensor(0).fill_(0xA5)  # another batch's
    ring.tensor(1).fill_(0xA5)
    states = views(ring.tensor(0), coded.states)
    for each in states.values():
        each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(1)))
    first = next(iter(states.values())).view(TOKENS, -1, HIDDEN)
    first[3, 0, 7], first[5, -1, 0], first[6] = torch.inf, torch.nan, 0.0
    ring.seal(0, 1, nbytes)
    with closing(Pinned(2, ring, coder)) as cells:
        cells.tensor(1).fill_(0x5A)
        assert cells.save(1, 0, 1, coded.codes.nbytes, copier, coded)
        image = cells.tensor(1)
        assert image[coded.codes.nbytes :].eq(0x5A).all()
        assert not any(image[gap].any() for gap in coded.codes.gaps())
        cells.load(1, 1, 7, coded.codes.nbytes, copier, coded)
    assert ring.generation(1) == 7
    slot = ring.tensor(1)
    found = views(slot, coded.states)
    assert found.keys() == states.keys()
    for name, each in states.items():
        assert torch.equal(found[name].view(torch.uint8), rounded(each).view(torch.uint8)), name
    read = next(iter(found.values())).view(TOKENS, -1, HIDDEN)
    assert read[3, 0].isnan().all()
    assert read[5, -1].isnan().all()
    assert read.isnan().any(2).sum() == 2
    assert not read[6].any()
    assert not any(slot[gap].any() for gap in coded.states.gaps())
    assert slot[nbytes:].eq(0xA5).all()
    assert torch.equal(ring.ledger.tensor(1)[:nbytes], slot[:nbytes])


def test_a_slot_that_is_refilled_while_it_is_encoded_is_not_saved(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, coded = coding._encode, coded_as(SPEC)

    def refilled(slot: torch.Tensor, image: torch.Tensor, how: Coded) -> None:
        encode(slot, image, how)
        ring.begin(0)

    with closing(Pinned(1, ring, Coder(ring, HIDDEN, "float32"))) as cells:
        ring.seal(0, 2, coded.states.nbytes)
        assert cells.save(0, 0, 2, coded.codes.nbytes, Copier(), coded)
        monkeypatch.setattr(coding, "_encode", refilled)
        assert not cells.save(0, 0, 2, coded.codes.nbytes, Copier(), coded)


def test_slots_of_codes_are_kept_as_they_lie() -> None:
    scaled = replace(SPEC, dtype=FP8)
    assert Coded.of(scaled, slot_layout(scaled, HIDDEN, TOKENS)) is None


@given(
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(1, 6),
    st.integers(1, 300),
    st.integers(1, 200),
    st.integers(0, 9),
    st.booleans(),
)
def test_a_cell_has_room_for_whatever_fills_a_slot(
    dtype: StateDtype, rows: int, hidden: int, tokens: int, taps: int, final: bool
) -> None:
    size = slot_bytes(CaptureSpec(taps=tuple(range(rows)), dtype=dtype), hidden, tokens)
    spec = CaptureSpec(taps=tuple(range(taps)), final=final or not taps, dtype=dtype)
    most = max(
        (count for count in range(1, 7 * tokens + 1) if slot_layout(spec, hidden, count).nbytes <= size), default=0
    )
    if most:
        coded = Coded.of(spec, slot_layout(spec, hidden, most))
        assert coded is not None
        with closing(HostArena.create(1, size, None)) as ring:
            cell_bytes = Coder(ring, hidden, dtype).cell_bytes
        assert coded.codes.nbytes <= cell_bytes
        assert cell_bytes % 4096 == 0


@pytest.mark.parametrize(("dtype", "more"), [("bfloat16", 1.96), ("float32", 3.9)])
def test_the_same_memory_holds_twice_as_many_batches_of_bfloat16_and_four_times_of_float32(
    dtype: StateDtype, more: float
) -> None:
    spec, budget = CaptureSpec(taps=(0, 1, 2, 3, 4), dtype=dtype), 3 * 10**8
    with closing(HostArena.create(1, slot_bytes(spec, 576, 512), None)) as ring:
        cell_bytes = Coder(ring, 576, dtype).cell_bytes
        assert more < cells_in(budget, cell_bytes) / cells_in(budget, ring.stride) <= more + 0.1
        assert more < offset(1000, ring.stride) / offset(1000, cell_bytes) <= more + 0.1
