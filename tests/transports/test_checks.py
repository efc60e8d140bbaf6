"""What transports check: hellos and offers, the generation around a copy, the bytes of a probe."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from specd.errors import TransportError
from specd.memory.cuda import Copier
from specd.transports.base import SlotRef
from specd.transports.checks import pattern, pull, unwrap, wrap

GOLDEN = "9eee6dbf13703835a829e187e6f5b032f3e0d6cb"


class _Refilled:
    """An arena whose slot is refilled at the very moment it is read."""

    memory = "host"
    num_slots, slot_bytes = 1, 16

    def __init__(self) -> None:
        self.now = 1

    def generation(self, slot: int) -> int:
        return self.now

    def tensor(self, slot: int) -> torch.Tensor:
        self.now = 2
        return torch.zeros(16, dtype=torch.uint8)


def test_pull_looks_at_the_generation_again_after_the_copy() -> None:
    into = torch.ones(16, dtype=torch.uint8)
    with pytest.raises(TransportError, match="holds generation 2, the lease is for 1"):
        pull(_Refilled(), SlotRef(0, 1, 16), into, Copier())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "into",
    [
        torch.zeros(15, dtype=torch.uint8),
        torch.zeros(16),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(32, dtype=torch.uint8)[::2],
    ],
)
def test_pull_refuses_a_destination_that_does_not_fit(into: torch.Tensor) -> None:
    with pytest.raises(TransportError, match="contiguous uint8 vector"):
        pull(_Refilled(), SlotRef(0, 1, 16), into, Copier())  # type: ignore[arg-type]


def test_patterns_are_the_same_everywhere() -> None:
    assert pattern(b"nonce", 20).tobytes().hex() == GOLDEN
    assert pattern(b"nonce", 13).tobytes() == pattern(b"nonce", 20).tobytes()[:13]
    assert pattern(b"nonc", 20).tobytes() != pattern(b"nonce", 20).tobytes()
    assert pattern(b"", 0).dtype == np.uint8


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    slots: int


def test_facts_survive_their_journey_and_damage_is_named() -> None:
    whole = wrap(Facts(slots=3))
    assert unwrap(whole, Facts, "test offer") == Facts(slots=3)
    for length in range(len(whole)):
        with pytest.raises(TransportError, match=f"not a test offer: {length} bytes that do not match their checksum"):
            unwrap(whole[:length], Facts, "test offer")
    for other in ({"slots": "three"}, {"slots": 3, "more": 1}, None):
        with pytest.raises(TransportError, match="not a test offer: "):
            unwrap(wrap(other), Facts, "test offer")
