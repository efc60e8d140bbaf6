"""States that travel as float8 are, to the bit, the target's own, encoded and decoded, by every way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import zmq
from msgspec.structs import replace

from exact import Context, learns, losses, write_model
from exact import daemon_config as exact_config
from fills import rounded
from members import SYNTHETIC, digest, follow, own_process, together
from samples import batch
from specd.client.subscriber import Subscriber
from specd.config.settings import CaptureConfig, DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import embedded
from specd.errors import ConfigError, RejectedError
from specd.protocol.batch import Delivery
from specd.protocol.capture import FP8, CaptureSpec

COUNT = 6
PLAIN = CaptureSpec(taps=(2, 3, 6), final=True, dtype="float32")
SCALED = replace(PLAIN, dtype=FP8)
RING = RingConfig(slots=12, slot_tokens=64)
CAPTURE = CaptureConfig(num_taps=6, final=True)


@pytest.fixture(scope="module")
def daemon() -> Iterator[str]:
    with own_process("--set", "target.exact=false") as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def threads() -> Iterator[tuple[Context, str]]:
    settings = DaemonConfig(target=TargetConfig(model=SYNTHETIC), ring=RING, capture=CAPTURE)
    with zmq.Context() as context, embedded(settings, context) as here:
        yield context, here.endpoint


@pytest.fixture(scope="module")
def expected(threads: tuple[Context, str]) -> list[str]:
    """The digests of the target's own states, rounded here."""
    context, endpoint = threads
    config = SubscriberConfig(endpoints=(endpoint,))
    found = []
    with Subscriber(config, PLAIN, context=context) as source:
        for each in source.stream(map(batch, range(COUNT))):
            assert each.taps is not None
            assert each.final is not None
            final = rounded(each.final)
            assert not torch.equal(final, each.final)
            found.append(digest(Delivery(each.batch, rounded(each.taps), final)))
    return found


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("transport", ["inproc", "shm", "bytes"])
def test_deliveries_are_the_targets_states_rounded(
    transport: str, depth: int, daemon: str, threads: tuple[Context, str], expected: list[str]
) -> None:
    context, local = threads if transport == "inproc" else (None, daemon)
    config = SubscriberConfig(endpoints=(local,), transport=transport, depth=depth)
    with Subscriber(config, SCALED, context=context) as source:
        assert (source.spec.dtype, source.dtype) == (FP8, "float32")
        assert [digest(each) for each in source.stream(map(batch, range(COUNT)))] == expected


def test_one_daemon_serves_both_and_a_share_of_either(daemon: str, expected: list[str]) -> None:
    """Members of a share cut their codes and scales out of what it holds, while others take plain states."""
    less = CaptureSpec(taps=(3, 5), dtype=FP8)
    alone = [follow(daemon, "bytes", spec, COUNT).digests for spec in (less, PLAIN)]
    meet = threading.Barrier(3)
    found = together([
        partial(follow, daemon, "bytes", SCALED, COUNT, share="rounded", meet=meet),
        partial(follow, daemon, "shm", less, COUNT, share="rounded", meet=meet),
        partial(follow, daemon, "shm", PLAIN, COUNT, meet=meet),
    ])  # fmt: skip
    assert [one.digests for one in found] == [expected, *alone]
    assert sum(one.stats.shared for one in found[:2]) >= COUNT - 1


def test_what_cannot_be_right_is_refused_in_one_sentence(daemon: str, threads: tuple[Context, str]) -> None:
    link = SubscriberConfig(endpoints=(daemon,), transport="shm")
    with pytest.raises(ConfigError, match="borrow=true with states in float8_e4m3fn: they have to be decoded"):
        Subscriber(replace(link, borrow=True), SCALED)
    with (
        Subscriber(replace(link, share="s"), PLAIN),
        pytest.raises(RejectedError, match="share s captures float32, this trainer wants float8_e4m3fn"),
    ):
        Subscriber(replace(link, share="s"), SCALED)
    exact = DaemonConfig(target=TargetConfig(model=SYNTHETIC, exact=True), ring=RING, capture=CAPTURE)
    with (
        embedded(exact, threads[0]) as here,
        pytest.raises(RejectedError, match="which rounds them, and this daemon's target is exact"),
    ):
        Subscriber(SubscriberConfig(endpoints=(here.endpoint,)), SCALED, context=threads[0])


def test_a_draft_learns_from_them(tmp_path: Path) -> None:
    settings = exact_config(write_model(tmp_path))
    apart = replace(settings, target=replace(settings.target, exact=False, max_forward_tokens=1))  # one by one
    with zmq.Context() as context, embedded(apart, context) as here:
        run = partial(losses, transport="inproc", depth=2, endpoints=(here.endpoint,), context=context)
        plain, found = run(tmp_path / "plain"), run(tmp_path / "rounded", travels=FP8)
    assert learns(found)
    assert found != plain
    assert all(abs(one - other) < 0.05 * other for one, other in zip(found, plain, strict=True) if one and other)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("transport", ["cuda_ipc", "shm", "bytes"])
def test_a_gpu_gives_the_same_bits(transport: str, expected: list[str]) -> None:
    """Encoded and decoded there, alone and as a cut of a share; the target's states have the same bits there, too."""
    options = ("--set", "target.exact=false", "--device", "cuda:0", "--transports", transport)
    less = CaptureSpec(taps=(3, 5), dtype=FP8)
    with own_process(*options) as endpoint:
        stream = partial(follow, endpoint, transport, device="cuda:0")
        own, meet = stream(less, COUNT).digests, threading.Barrier(2)
        found = together([partial(stream, spec, COUNT, share="s", meet=meet) for spec in (SCALED, less)])
    assert [one.digests for one in found] == [expected, own]
