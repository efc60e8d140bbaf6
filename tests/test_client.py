"""The subscriber against an embedded daemon with a synthetic target: order, depth, content, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from specd.capture import CaptureSpec
from specd.client import Subscriber
from specd.config import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.errors import BatchError, DaemonError, RejectedError
from specd.host import Embedded, embedded
from specd.packing import Batch
from samples import batch

SPEC = CaptureSpec(taps=(1, 3), final=True, dtype="float32")


def daemon_config(model: str = "synthetic:hidden=16,layers=6,vocab=128", **ring: int) -> DaemonConfig:
    return DaemonConfig(
        target=TargetConfig(model=model), ring=RingConfig(**{"slots": 4, "max_sessions": 2, "slot_tokens": 64, **ring})
    )


@pytest.fixture(scope="module")
def host() -> Iterator[Embedded]:
    with embedded(daemon_config()) as host:
        yield host


def subscriber(host: Embedded, depth: int = 2, **options: object) -> Subscriber:
    config = SubscriberConfig(endpoints=(host.endpoint,), depth=depth, timeout_s=20, connect_s=20)
    return Subscriber(config, SPEC, context=host.context, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_delivers_every_batch_in_order_with_its_own_states(host: Embedded, depth: int) -> None:
    batches = [batch(i, (1 + i % 7, 2)) for i in range(40)]
    seen = []
    with subscriber(host, depth) as source:
        alone = {}
        for item in source.stream(iter(batches)):
            assert item.taps is not None and item.final is not None
            assert item.taps.shape == (item.batch.num_tokens, 2, 16)
            alone[item.batch.index] = item.taps.clone()
            seen.append(item.batch.index)
        again = {item.batch.index: item.taps.clone() for item in source.stream(iter(batches)) if item.taps is not None}
    assert seen == list(range(40))
    assert all(torch.equal(alone[i], again[i]) for i in seen)
    assert not torch.equal(alone[7], alone[14])


def test_two_positions_of_the_same_content_are_two_deliveries(host: Embedded) -> None:
    with subscriber(host, 3) as source:
        items = [(d.batch.index, d.taps.clone()) for d in source.stream([batch(1), batch(1), batch(1)]) if d.taps is not None]
    assert len(items) == 3
    assert torch.equal(items[0][1], items[2][1])


def test_a_batch_that_does_not_fit_is_named(host: Embedded) -> None:
    with subscriber(host) as source:
        stream = source.stream([batch(0), batch(1, (4000,)), batch(2)])
        assert next(stream).batch.index == 0
        with pytest.raises(BatchError, match=r"batch 1 of epoch 0 .*ring\.slot_tokens"):
            next(stream)


def test_a_token_outside_the_vocabulary_is_named(host: Embedded) -> None:
    bad = batch(3)
    bad.tokens[2] = 128
    with subscriber(host) as source, pytest.raises(BatchError, match="token id 128 is outside"):
        next(source.stream([bad]))


def test_the_window_never_exceeds_the_depth(host: Embedded) -> None:
    drawn = 0

    def source_of_batches() -> Iterator[Batch]:
        nonlocal drawn
        for i in range(20):
            drawn += 1
            yield batch(i)

    with subscriber(host, 2) as source:
        for count, _ in enumerate(source.stream(source_of_batches())):
            assert drawn <= count + 1 + 2


def test_a_stream_left_early_gives_everything_back(host: Embedded) -> None:
    with subscriber(host, 3) as source:
        for _ in range(20):
            stream = source.stream(batch(i) for i in range(10))
            next(stream)
            stream.close()
        assert [d.batch.index for d in source.stream([batch(5), batch(6)])] == [5, 6]


def test_an_illegal_tap_is_refused(host: Embedded) -> None:
    config = SubscriberConfig(endpoints=(host.endpoint,))
    with pytest.raises(RejectedError, match="taps"):
        Subscriber(config, CaptureSpec(taps=(5,), dtype="float32"), context=host.context)


def test_another_target_is_refused_with_both_values(host: Embedded) -> None:
    with pytest.raises(RejectedError, match="not the trainer's.*synthetic.*another"):
        subscriber(host, fingerprint="another")


def test_artifacts_come_over_the_wire(host: Embedded) -> None:
    with subscriber(host) as source:
        embedding = source.tensor("embedding")
        assert embedding.shape == (128, 16)
        assert b"hidden_size" in source.artifact("config.json")


def test_no_daemon_is_an_error_with_the_endpoint(tmp_path: object) -> None:
    config = SubscriberConfig(endpoints=(f"ipc://{tmp_path}/none.sock",), connect_s=0.2)
    with pytest.raises(DaemonError, match=r"none\.sock"):
        Subscriber(config, SPEC)


def test_two_daemons_share_the_work_and_order_holds() -> None:
    with embedded(daemon_config()) as one, embedded(daemon_config()) as two:
        # Two contexts cannot share inproc endpoints, so each subscriber here has one; over ipc see test_faults.
        with subscriber(one, 2) as a, subscriber(two, 2) as b:
            left = [d.taps.clone() for d in a.stream(batch(i) for i in range(5)) if d.taps is not None]
            right = [d.taps.clone() for d in b.stream(batch(i) for i in range(5)) if d.taps is not None]
    assert all(torch.equal(x, y) for x, y in zip(left, right, strict=True))
