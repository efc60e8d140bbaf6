"""The contract: what traits of the built-in transports promise, and that it costs no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from specd.errors import TransportError
from specd.transports.base import Traits
from specd.transports.registry import BUILTIN, load


def test_an_error_says_whether_the_client_is_lost() -> None:
    assert not TransportError("torn").lost
    assert TransportError("aborted", lost=True).lost
    assert str(TransportError("aborted", lost=True)) == "aborted"


def test_it_imports_without_torch() -> None:
    transports = ", ".join(f"specd.transports.{name}" for name in BUILTIN)
    modules = f"specd.transports.base, specd.memory.arena, specd.memory.cuda, specd.memory.device_arena, {transports}"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ranks_leave_room_between_any_two() -> None:
    ranks = {name: load(name).traits.rank for name in BUILTIN}
    assert ranks == {"inproc": 100, "cuda_ipc": 200, "nixl": 300, "nccl": 400, "shm": 500, "bytes": 600}
    assert Traits.__doc__ is not None
    text = " ".join(Traits.__doc__.split())
    assert ", ".join(f"{name} {rank}" for name, rank in ranks.items()) in text


@pytest.mark.parametrize("name", BUILTIN)
def test_traits_agree_with_one_another(name: str) -> None:
    traits = load(name).traits
    assert traits.one_sided != traits.needs_recv_ready, "a push begins when the trainer says that it receives"
    assert not traits.borrow or "device" in traits.memory
