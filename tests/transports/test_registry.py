"""Choosing a transport and finding it: pure functions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specd.errors import TransportError
from specd.memory.cuda import Copier
from specd.transports import registry
from specd.transports.base import SlotRef, Traits
from specd.transports.checks import pattern, pull
from specd.transports.registry import BUILTIN, DEVICE_ORDER, HOST_ORDER, choose, load, names

GOLDEN = "9eee6dbf13703835a829e187e6f5b032f3e0d6cb"
NAMES = ("inproc", "cuda_ipc", "nixl", "nccl", "shm", "bytes", "rdma", "carrier")
GPU = "cuda:1"


def probe_of(works: set[str]) -> tuple[list[str], Callable[[str], str | None]]:
    tried: list[str] = []

    def probe(name: str) -> str | None:
        tried.append(name)
        return None if name in works else f"{name} is broken"

    return tried, probe


@pytest.mark.parametrize(
    ("asked", "offered", "same_process", "device", "works", "taken"),
    [
        ("auto", ("shm", "bytes"), False, "cpu", {"shm", "bytes"}, "shm"),
        ("auto", ("bytes", "shm"), False, "cpu", {"shm", "bytes"}, "shm"),
        ("auto", ("shm", "bytes"), False, "cpu", {"bytes"}, "bytes"),
        ("auto", ("bytes",), False, "cpu", {"shm", "bytes"}, "bytes"),
        ("auto", ("inproc", "shm"), True, "cpu", {"inproc", "shm"}, "inproc"),
        ("auto", ("inproc", "shm"), False, "cpu", {"inproc", "shm"}, "shm"),
        ("auto", ("rdma", "bytes"), False, "cpu", {"rdma"}, "rdma"),
        ("bytes", ("shm", "bytes"), False, "cpu", {"shm", "bytes"}, "bytes"),
        ("inproc", ("inproc",), False, "cpu", {"inproc"}, "inproc"),
        ("auto", ("shm", "bytes"), False, "cpu", set(), None),
        ("auto", (), False, "cpu", {"shm"}, None),
        ("auto", ("inproc",), False, "cpu", {"inproc"}, None),
        ("shm", ("bytes",), False, "cpu", {"shm", "bytes"}, None),
        ("shm", ("shm", "bytes"), False, "cpu", {"bytes"}, None),
        ("carrier", ("shm",), False, "cpu", {"shm"}, None),
        ("auto", ("cuda_ipc", "shm", "bytes"), False, "cpu", {"cuda_ipc", "shm", "bytes"}, "shm"),
        ("auto", NAMES, False, GPU, set(NAMES), "cuda_ipc"),
        ("auto", NAMES, True, GPU, set(NAMES), "inproc"),
        ("auto", NAMES, False, GPU, {"nixl", "nccl", "shm"}, "nixl"),
        ("auto", ("bytes", "shm", "nccl"), False, GPU, {"nccl", "shm", "bytes"}, "nccl"),
        ("auto", ("nccl", "shm", "bytes"), False, GPU, {"shm", "bytes"}, "shm"),
        ("auto", ("rdma", "nccl"), False, GPU, {"rdma", "nccl"}, "nccl"),
        ("cuda_ipc", ("nccl", "cuda_ipc"), False, GPU, {"nccl"}, None),
        ("nccl", NAMES, False, GPU, set(NAMES), "nccl"),
    ],
)
def test_choose_table(
    asked: str, offered: tuple[str, ...], same_process: bool, device: str, works: set[str], taken: str | None
) -> None:
    _, probe = probe_of(works)
    if taken is None:
        with pytest.raises(TransportError):
            choose(asked, offered, same_process, device, probe)
    else:
        assert choose(asked, offered, same_process, device, probe).name == taken


@given(
    asked=st.sampled_from(("auto", *NAMES)),
    offered=st.lists(st.sampled_from(NAMES), unique=True),
    works=st.sets(st.sampled_from(NAMES)),
    same_process=st.booleans(),
    device=st.sampled_from(("cpu", GPU)),
)
def test_choose_never_takes_another_or_an_unverified_one(
    asked: str, offered: list[str], works: set[str], same_process: bool, device: str
) -> None:
    tried, probe = probe_of(works)
    usable = works & (set(offered) if asked == "auto" else {asked} & set(offered))
    if asked == "auto" and not same_process:
        usable -= {"inproc"}
    if not usable:
        with pytest.raises(TransportError) as caught:
            choose(asked, offered, same_process, device, probe)
        assert all(name in str(caught.value) for name in tried)
    else:
        choice = choose(asked, offered, same_process, device, probe)
        assert choice.name in offered
        assert choice.name in works
        assert choice.name == tried[-1]
        assert asked in ("auto", choice.name)
        assert choice.name not in choice.reasons
        assert set(tried[:-1]) <= set(choice.reasons)
        assert all(choice.reasons[name] for name in choice.reasons)
        if asked == "auto" and choice.name not in ("inproc", "rdma", "carrier"):
            order = HOST_ORDER if device == "cpu" else DEVICE_ORDER
            better = order[: order.index(choice.name)] if choice.name in order else order
            assert not set(better) & usable, "a better one works"
    assert set(tried) <= set(offered)
    assert len(tried) == len(set(tried))


def test_host_memory_is_the_last_resort_of_a_gpu() -> None:
    assert DEVICE_ORDER[-len(HOST_ORDER) :] == HOST_ORDER
    assert {"inproc", *DEVICE_ORDER} == set(BUILTIN)


def test_a_probe_that_raises_is_a_reason() -> None:
    def probe(name: str) -> str | None:
        if name == "shm":
            raise TransportError("no such segment")
        return None

    assert choose("auto", ("shm", "bytes"), False, "cpu", probe) == ("bytes", {"shm": "no such segment"})
    with pytest.raises(TransportError, match="'shm' cannot be used: no such segment"):
        choose("shm", ("shm", "bytes"), False, "cpu", probe)


def test_an_error_says_whether_the_client_is_lost() -> None:
    assert not TransportError("torn").lost
    assert TransportError("aborted", lost=True).lost
    assert str(TransportError("aborted", lost=True)) == "aborted"


def test_registry_loads_every_built_in_one() -> None:
    assert names()[: len(BUILTIN)] == list(BUILTIN)
    for name in BUILTIN:
        assert isinstance(load(name).traits, Traits)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TransportError, match="'pigeon'; known here: inproc, cuda_ipc, nixl, nccl, shm, bytes"):
        load("pigeon")


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("specd.nowhere:X", "No module named"),
        ("specd.transports.base:Nothing", "no attribute"),
        ("specd.transports.registry:choose", "expected a class with traits"),
    ],
)
def test_a_broken_entry_says_what_failed(target: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILTIN, "broken", target)
    with pytest.raises(TransportError, match=match):
        load("broken")


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


def test_it_imports_without_torch() -> None:
    transports = ", ".join(f"specd.transports.{name}" for name in BUILTIN)
    modules = f"specd.transports.base, specd.memory.arena, specd.memory.cuda, specd.memory.device_arena, {transports}"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
