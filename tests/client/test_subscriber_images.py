"""Images from a trainer to a target, and back as states: beside text, and refused where none are taken."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import vision
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, ReplayConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import Embedded, embedded
from specd.errors import BatchError, RejectedError
from specd.protocol import payload
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec

KIND = "qwen2_5_vl"
SPEC = CaptureSpec(taps=(0, 4), dtype="float32")
NAMES = ("image_grid_thw", "mm_token_type_ids", "pixel_values")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.write(KIND, tmp_path_factory.mktemp(KIND))


def settings(folder: Path, mib: int) -> DaemonConfig:
    ring = RingConfig(slots=4, max_sessions=2, slot_tokens=64, payload_mib=mib)
    return DaemonConfig(target=TargetConfig(model=f"{folder}/", device="cpu", dtype="float32"), ring=ring)


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[Embedded]:
    with embedded(msgspec.structs.replace(settings(folder, 1), replay=ReplayConfig(ram_gb=0.001))) as host:
        yield host


def subscriber(host: Embedded, payloads: tuple[str, ...] = NAMES) -> Subscriber:
    config = SubscriberConfig(endpoints=(host.endpoint,), depth=2, timeout_s=20, connect_s=20)
    return Subscriber(config, SPEC, context=host.context, payloads=payloads)


def batch(index: int, *seeds: int | None) -> Batch:
    """A sequence with an image for each seed, of the same tokens; text alone for None."""
    ids, _ = vision.sequence(KIND, 4, 7)
    brought = [payload.pack(vision.sequence(KIND, 4, 7, seed)[1]) if seed is not None else b"" for seed in seeds]
    tokens = np.concatenate([ids] * len(seeds))
    return Batch(
        tokens=tokens, lengths=np.full(len(seeds), ids.size, np.int32), loss_mask=np.ones(tokens.size, np.bool_),
        samples=tuple(range(len(seeds))), index=index, payloads=tuple(brought) if any(brought) else (),
    )  # fmt: skip


def test_equal_tokens_with_other_images_never_meet(host: Embedded, folder: Path) -> None:
    batches = [batch(0, 1), batch(1, 2), batch(2, None), batch(3, 1, None, 2), batch(4, 1)]
    with subscriber(host) as source:
        found = [each.taps.clone() for each in source.stream(batches) if each.taps is not None]
        kept = [each.taps.clone() for each in source.stream(batches) if each.taps is not None]
        assert source.stats().replayed > 0
    one, two, none, three, again = found
    size = len(one)
    assert torch.equal(one, again)
    assert all(map(torch.equal, kept, found))
    assert not torch.allclose(one, two, atol=0.1)
    assert not torch.allclose(one, none, atol=0.1)
    torch.testing.assert_close(three, torch.cat([one, none, two]), rtol=1e-5, atol=1e-5)
    ids, brought = vision.sequence(KIND, 4, 7)
    states = vision.plain(folder, ids, vision.sequence(KIND, 4, 7, 2)[1])
    torch.testing.assert_close(two, torch.stack([states[0], states[4]], dim=1), rtol=1e-4, atol=1e-4)
    assert size == ids.size
    assert set(brought) == set(NAMES)


def test_a_batch_that_the_target_cannot_run_is_named_and_others_go_on(host: Embedded) -> None:
    bad = payload.unpack(batch(0, 1).payloads[0])
    pixels = vision.array(torch.zeros(3, 1176))
    with subscriber(host) as source:
        stream = source.stream([batch(0, 1), _with(batch(1, 1), {**bad, "pixel_values": pixels}), batch(2, 2)])
        assert next(stream).batch.index == 0
        with pytest.raises(BatchError, match=r"pixel_values of a sequence is \[3, 1176\], .* asks for other patches"):
            next(stream)
        large = {**bad, "pixel_values": vision.array(torch.zeros(300, 1176))}
        with pytest.raises(BatchError, match=r"brings \d+ bytes of payloads and a daemon takes 1048576: .*payload_mib"):
            next(source.stream([_with(batch(3, 1), large)]))
        assert [each.batch.index for each in source.stream([batch(4, 2)])] == [4]


def _with(batch: Batch, brought: payload.Payload) -> Batch:
    return Batch(
        tokens=batch.tokens, lengths=batch.lengths, loss_mask=batch.loss_mask, samples=batch.samples,
        index=batch.index, payloads=(payload.pack(brought),),
    )  # fmt: skip


def test_a_trainer_with_images_is_refused_where_text_alone_is_taken(folder: Path) -> None:
    with embedded(settings(folder, 0)) as host:
        with pytest.raises(RejectedError, match=r"set to take text alone: start it with --set ring\.payload_mib=64"):
            subscriber(host)
        subscriber(host, ()).close()


def test_a_target_without_images_says_so_however_the_daemon_is_set() -> None:
    ring = RingConfig(slots=4, max_sessions=2, slot_tokens=64, payload_mib=1)
    config = DaemonConfig(target=TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128"), ring=ring)
    with embedded(config) as host, pytest.raises(RejectedError, match="takes text alone here: train on text"):
        subscriber(host)
