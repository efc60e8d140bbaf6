"""Choosing a transport, a pure function of traits; and finding it by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specd.errors import TransportError
from specd.transports import registry
from specd.transports.base import Traits
from specd.transports.registry import BUILTIN, choose, known, load, names, preferred

NAMES = ("inproc", "cuda_ipc", "nixl", "nccl", "shm", "bytes", "rdma", "carrier")
GPU = "cuda:1"


def facts(memory: str, scope: str, rank: int | None) -> Traits:
    """Traits, as far as the choice depends on them."""
    return Traits(
        memory=frozenset(memory.split()),  # type: ignore[arg-type]
        scope=scope,  # type: ignore[arg-type]
        one_sided=True,
        needs_recv_ready=False,
        abortable=True,
        rank=rank,
    )


TRAITS = {
    "inproc": facts("host device", "process", 100),
    "cuda_ipc": facts("device", "host", 200),
    "nixl": facts("host device", "anywhere", 300),
    "nccl": facts("device", "anywhere", 400),
    "shm": facts("host", "host", 500),
    "bytes": facts("host", "anywhere", 600),
    "rdma": facts("host device", "anywhere", 250),
    "carrier": facts("host", "host", None),
}
"""The built-in transports, and two plug-ins: one that says where it stands, and one that leaves it to who names it."""


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
        ("auto", ("carrier", "bytes"), False, "cpu", {"carrier", "bytes"}, "bytes"),
        ("auto", ("carrier", "bytes"), False, GPU, {"carrier"}, "carrier"),
        ("auto", ("nixl", "bytes"), False, "cpu", {"nixl", "bytes"}, "bytes"),
        ("auto", ("nixl",), False, "cpu", {"nixl"}, "nixl"),
        ("auto", ("stranger", "bytes"), False, "cpu", {"stranger", "bytes"}, "bytes"),
        ("auto", ("stranger",), False, "cpu", {"stranger"}, "stranger"),
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
        ("auto", NAMES, False, GPU, {"rdma", "nixl", "nccl"}, "rdma"),
        ("auto", ("bytes", "shm", "nccl"), False, GPU, {"nccl", "shm", "bytes"}, "nccl"),
        ("auto", ("nccl", "shm", "bytes"), False, GPU, {"shm", "bytes"}, "shm"),
        ("auto", ("rdma", "nccl"), False, GPU, {"rdma", "nccl"}, "rdma"),
        ("auto", ("carrier", "nccl"), False, GPU, {"carrier", "nccl"}, "nccl"),
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
            choose(asked, offered, TRAITS, same_process, device, probe)
    else:
        assert choose(asked, offered, TRAITS, same_process, device, probe).name == taken


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
        usable -= {name for name in usable if TRAITS[name].scope == "process"}
    if not usable:
        with pytest.raises(TransportError) as caught:
            choose(asked, offered, TRAITS, same_process, device, probe)
        assert all(name in str(caught.value) for name in tried)
    else:
        choice = choose(asked, offered, TRAITS, same_process, device, probe)
        assert choice.name in offered
        assert choice.name in works
        assert choice.name == tried[-1]
        assert asked in ("auto", choice.name)
        assert choice.name not in choice.reasons
        assert set(tried[:-1]) <= set(choice.reasons)
        assert all(choice.reasons[name] for name in choice.reasons)
        if asked == "auto":
            order = preferred(TRAITS, device, same_process)
            better = order[: order.index(choice.name)] if choice.name in order else order
            assert not set(better) & usable, "a better one works"
    assert set(tried) <= set(offered)
    assert len(tried) == len(set(tried))


def test_host_memory_is_the_last_resort_of_a_gpu() -> None:
    assert preferred(TRAITS, GPU) == ["cuda_ipc", "rdma", "nixl", "nccl", "shm", "bytes"]
    assert preferred(TRAITS, "cpu") == ["shm", "bytes"]
    assert preferred(TRAITS, GPU, same_process=True)[:2] == ["inproc", "cuda_ipc"]
    assert preferred(TRAITS, "cpu", same_process=True) == ["inproc", "shm", "bytes"]
    assert {name: TRAITS[name] for name in preferred(known(()), GPU)}.keys() == {*BUILTIN} - {"inproc"}


@given(traits=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.sampled_from([*TRAITS.values()])))
def test_the_order_is_by_rank_and_holds_what_suits(traits: dict[str, Traits]) -> None:
    for device in ("cpu", GPU):
        order = preferred(traits, device)
        ranks = [rank for name in order if (rank := traits[name].rank) is not None]
        assert len(ranks) == len(order)
        assert ranks == sorted(ranks)
        for name in traits.keys() - {*order}:
            left_out = traits[name]
            assert (
                left_out.rank is None
                or left_out.scope == "process"
                or (device == "cpu" and "device" in left_out.memory)
            )


def test_what_is_known_here_is_the_built_in_and_the_wanted_that_can_be_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [*known(("pigeon",))] == [*BUILTIN]
    monkeypatch.setitem(registry.BUILTIN, "broken", "specd.nowhere:X")
    assert [*known(())] == [name for name in BUILTIN if name != "broken"]
    for name, traits in known(()).items():
        assert (traits.memory, traits.scope, traits.rank) == (
            TRAITS[name].memory,
            TRAITS[name].scope,
            TRAITS[name].rank,
        )


def test_one_transport_needs_no_second_process() -> None:
    near = [name for name, traits in known(()).items() if traits.scope == "process"]
    assert near == [registry.WITHIN_PROCESS]


def test_a_probe_that_raises_is_a_reason() -> None:
    def probe(name: str) -> str | None:
        if name == "shm":
            raise TransportError("no such segment")
        return None

    assert choose("auto", ("shm", "bytes"), TRAITS, False, "cpu", probe) == ("bytes", {"shm": "no such segment"})
    with pytest.raises(TransportError, match="'shm' cannot be used: no such segment"):
        choose("shm", ("shm", "bytes"), {}, False, "cpu", probe)


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
