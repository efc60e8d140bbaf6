"""Raw copies: that they copy, which one stands next to which transport, and that a failure is remembered."""

from __future__ import annotations

from contextlib import closing
from types import SimpleNamespace

import pytest
import torch

from specd.bench.transport import raw
from specd.errors import TransportError
from specd.transports.base import Traits
from specd.transports.registry import known

TRAITS = known(())


def test_a_host_copy_moves_bytes_between_buffers_in_turn() -> None:
    with closing(raw.HostCopy(100, 2)) as copy:
        into = [pair[0] for pair in copy._pairs]
        assert copy.one(60) > 0
        assert [int(one.sum()) for one in into] == [60, 0]
        assert copy.stream(100, 3) > 0
        assert [int(one.sum()) for one in into] == [100, 100]


@pytest.mark.parametrize(
    ("source", "target", "kind"),
    [
        ("cpu", "cuda:0", "pinned H2D"),
        ("cuda:0", "cpu", "pinned D2H"),
        ("cuda:0", "cuda:0", "device copy"),
        ("cuda:0", "cuda:1", "peer copy"),
    ],
)
def test_kinds_are_named_for_people(source: str, target: str, kind: str) -> None:
    assert raw._kind(source, target) == kind


def test_only_what_both_gpus_send_and_receive_is_two_sided() -> None:
    assert [name for name, traits in TRAITS.items() if raw.two_sided(traits)] == ["nccl"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What a shelf made."""
    log: list[tuple[object, ...]] = []

    def copy(*what: object) -> SimpleNamespace:
        log.append(what)
        return SimpleNamespace(close=lambda: log.append(("closed", *what)))

    monkeypatch.setattr(raw, "DeviceCopy", copy)
    return log


def test_a_shelf_makes_each_copy_once_and_frees_it(made: list[tuple[object, ...]]) -> None:
    shelf = raw.Shelf("cuda:0", "cuda:1", 4096, 4)
    assert shelf.ring == (4, 4096)
    assert shelf.for_transport(TRAITS["cuda_ipc"]) is shelf.for_transport(TRAITS["nixl"])
    assert shelf.for_transport(TRAITS["shm"]) is shelf.for_transport(TRAITS["bytes"])
    shelf.to_host()
    copies = [("cuda:0", "cuda:1", 4096, 4), ("cpu", "cuda:1", 4096, 1), ("cuda:0", "cpu", 4096, 1)]
    assert made == copies
    shelf.close()
    shelf.close()
    assert sorted(map(str, made[3:])) == sorted(str(("closed", *copy)) for copy in copies)


def test_on_the_cpu_everything_stands_next_to_a_host_copy() -> None:
    with closing(raw.Shelf("cpu", "cpu", 4096, 1)) as shelf:
        found: list[raw.Raw] = [shelf.for_transport(traits) for traits in TRAITS.values()]
        assert {one.kind for one in found} == {"host copy"}
        assert len({id(one) for one in found}) == 1


def test_why_a_copy_cannot_be_made_is_said_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Traits] = []

    def fail(*_: object) -> None:
        tries.append(TRAITS["shm"])
        raise TransportError("no cupy")

    monkeypatch.setattr(raw, "DeviceCopy", fail)
    shelf = raw.Shelf("cuda:0", "cuda:0", 4096, 1)
    for _ in range(2):
        with pytest.raises(TransportError, match="no cupy"):
            shelf.for_transport(TRAITS["shm"])
    assert len(tries) == 1
    shelf.close()


@pytest.mark.gpu(1)
def test_copies_of_a_gpu_move_at_memory_speed() -> None:
    size = 64 << 20
    for source, target in (("cuda:0", "cuda:0"), ("cpu", "cuda:0"), ("cuda:0", "cpu")):
        with closing(raw.DeviceCopy(source, target, size, 2)) as copy:
            copy.one(size)
            assert size / copy.one(size) > 1e9, copy.kind
            assert 4 * size / copy.stream(size, 4) > 1e9, copy.kind
    with closing(raw.MirrorCopy("cuda:0", size)) as hop:
        hop.one(size)
        assert 2 * size / hop.stream(size, 2) > 1e9
    torch.cuda.synchronize()
