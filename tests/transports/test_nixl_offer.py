"""What a nixl trainer believes of an offer: that it describes a ring, and nothing that was damaged or made up."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from specd.errors import TransportError
from specd.memory.arena import LINE
from specd.transports.checks import wrap
from specd.transports.nixl.agent import Region
from specd.transports.nixl.transport import NixlOffer, checked


def offer(**changes: Any) -> NixlOffer:
    facts: dict[str, Any] = {
        "agent": "specd-x",
        "metadata": b"m",
        "slots": Region(memory="VRAM", address=1 << 30, nbytes=3 * 8192, device=1),
        "words": Region(memory="DRAM", address=4096 + 64 + 8, nbytes=2 * LINE + 8),
        "num_slots": 3,
        "slot_bytes": 8000,
        "stride": 8192,
    }
    return NixlOffer(**{**facts, **changes})


def test_an_offer_survives_its_journey() -> None:
    assert checked(wrap(offer())) == offer()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_slots": 0},
        {"num_slots": 4},
        {"num_slots": -3, "slots": Region(memory="DRAM", address=4096, nbytes=-3 * 8192)},
        {"slot_bytes": 0},
        {"slot_bytes": 8193},
        {"stride": 4096},
        {"slots": Region(memory="DRAM", address=0, nbytes=3 * 8192)},
        {"slots": Region(memory="DRAM", address=-4096, nbytes=3 * 8192)},
        {"slots": Region(memory="DRAM", address=(1 << 64) - 8192, nbytes=3 * 8192)},
        {"slots": Region(memory="VRAM", address=4096, nbytes=3 * 8192, device=-1)},
        {"slots": Region(memory="VRAM", address=4096, nbytes=3 * 8192, device=1 << 40)},
        {"words": Region(memory="DRAM", address=4096, nbytes=2 * LINE)},
        {"words": Region(memory="DRAM", address=4097, nbytes=2 * LINE + 8)},
        {"words": Region(memory="VRAM", address=4096, nbytes=2 * LINE + 8)},
        {"metadata": b""},
        {"metadata": bytes((1 << 16) + 1)},
    ],
)
def test_an_offer_of_no_ring_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TransportError, match="no ring"):
        checked(wrap(offer(**changes)))


def test_a_mangled_offer_never_reaches_nixl() -> None:
    whole = wrap(offer())
    for length in range(len(whole)):
        with pytest.raises(TransportError):
            checked(whole[:length])
    for at in range(len(whole)):
        mangled = bytearray(whole)
        mangled[at] ^= 1
        with pytest.raises(TransportError, match="checksum"):
            checked(bytes(mangled))
    for facts in (None, {}, [1], {**msgspec.to_builtins(offer()), "more": 1}):
        with pytest.raises(TransportError, match="not a nixl offer"):
            checked(wrap(facts))
