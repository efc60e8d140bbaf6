"""Images in the transformers backend: states as transformers has them alone, whatever lies beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import vision
from fills import draw_tokens, read
from specd.config.settings import TargetConfig
from specd.errors import TargetError
from specd.protocol import payload
from specd.protocol.batch import slot_layout
from specd.protocol.capture import CaptureSpec
from specd.targets.base import CaptureJob, payload_tensor
from specd.targets.registry import load_target
from specd.targets.transformers.images import check_grids

SPEC = CaptureSpec(taps=(0, 1, 4), final=True, dtype="float32")
Sequences = Sequence[tuple[NDArray[np.int32], payload.Payload]]


@pytest.fixture(scope="module", params=sorted(vision.VISION))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kind of a model, its checkpoint, and the target."""
    folder = vision.write(request.param, tmp_path_factory.mktemp(request.param))
    return request.param, folder, load_target(TargetConfig(model=f"{folder}/", device="cpu", dtype="float32"))


def job(sequences: Sequences, spec: CaptureSpec = SPEC) -> CaptureJob:
    tokens = np.concatenate([ids for ids, _ in sequences])
    layout = slot_layout(spec, vision.HIDDEN, tokens.size)
    return CaptureJob(
        tokens=tokens,
        lengths=np.array([ids.size for ids, _ in sequences], np.int32),
        spec=spec,
        layout=layout,
        slot=memoryview(bytearray(b"\xa5" * (layout.nbytes + 64))),
        payloads=tuple(brought for _, brought in sequences),
    )


def text(count: int, seed: int) -> tuple[NDArray[np.int32], payload.Payload]:
    return draw_tokens(count, seed) % 240, {}


def check(folder: Path, fill: CaptureJob, sequences: Sequences) -> None:
    """The slot holds what transformers has for each sequence alone."""
    found, begin = read(fill), 0
    for ids, brought in sequences:
        states, rows = vision.plain(folder, ids, brought), slice(begin, begin + ids.size)
        for index, tap in enumerate(SPEC.taps):
            torch.testing.assert_close(found["taps"][rows, index], states[tap], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["final"][rows], states[-1], rtol=1e-4, atol=1e-4)
        begin += ids.size


def test_states_are_those_of_transformers_alone_and_merged_is_apart(served: Any) -> None:
    kind, folder, target = served
    one, other = vision.sequence(kind, 5, 9), vision.sequence(kind, 2, 20, seed=1)
    batches = [[text(11, 1), one, text(7, 2), text(3, 3)], [other, text(6, 4)]]
    merged = [job(batch) for batch in batches]
    target.run(merged)
    for batch, fill in zip(batches, merged, strict=True):
        check(folder, fill, batch)
        apart = job(batch)
        target.run([apart])
        # Text is packed with other text there, so sums are in another order.
        for name, rows in read(apart).items():
            torch.testing.assert_close(rows, read(fill)[name], rtol=1e-5, atol=1e-5)
    again = [job(batch) for batch in batches]
    target.run(again)
    assert [bytes(fill.slot) for fill in again] == [bytes(fill.slot) for fill in merged]


def test_an_image_changes_what_follows_it_and_nothing_before(served: Any) -> None:
    kind, _, target = served
    (ids, one), (_, other) = vision.sequence(kind, 5, 9), vision.sequence(kind, 5, 9, seed=1)
    other = {**one, "pixel_values": other["pixel_values"]}
    fills = [job([(ids, one)]), job([(ids, other)])]
    target.run(fills)
    first, second = (read(fill)["final"] for fill in fills)
    assert torch.equal(first[:6], second[:6])
    assert (first[6:] != second[6:]).any(dim=1).all()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda brought: {"pixel_values": brought["pixel_values"]} | {"strange": brought["pixel_values"]}, "strange"),
        (
            lambda brought: (
                brought
                | {
                    name: vision.array(payload_tensor(brought[name])[:, 1:])
                    for name in brought
                    if name.endswith("token_type_ids")
                }
            ),
            r"token_type_ids of a sequence is \[1, 21\], expected \[1, 22\]|\[1, 19\], expected \[1, 20\]",
        ),
        (
            lambda brought: brought | {"pixel_values": vision.array(payload_tensor(brought["pixel_values"])[:0])},
            "asks for other patches|does not fit|failed",
        ),
    ],
)
def test_what_does_not_belong_together_fails_and_the_target_lives_on(served: Any, damage: Any, said: str) -> None:
    kind, folder, target = served
    ids, brought = vision.sequence(kind, 5, 9)
    with pytest.raises(TargetError, match=said):
        target.run([job([(ids, damage(brought))])])
    sound = [text(4, 5), (ids, brought)]
    fill = job(sound)
    target.run([fill])
    check(folder, fill, sound)


@pytest.mark.parametrize("grid", [[-1, -4, 6], [1 << 32, 1 << 32, 6], [0, 1 << 20, 1 << 20]])
def test_grids_of_no_image_are_refused_before_memory_is_taken_for_them(grid: list[int]) -> None:
    _, brought = vision.sequence("qwen3_vl", 5, 9)
    arguments = {name: payload_tensor(array) for name, array in brought.items()}
    pixels = arguments["pixel_values"] if min(grid) < 0 else arguments["pixel_values"][:0]
    with pytest.raises(TargetError, match=r"image_grid_thw \[.*\] asks for other patches"):
        check_grids(arguments | {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])})
    with pytest.raises(TargetError, match="image_grid_thw without pixel_values"):
        check_grids({"image_grid_thw": torch.tensor([[1, 4, 6]])})
    check_grids(arguments)


@pytest.mark.gpu(1)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_5"])
def test_on_a_gpu_images_are_right_and_those_that_are_not_cost_one_batch(kind: str, tmp_path: Path) -> None:
    folder = vision.write(kind, tmp_path / kind)
    target: Any = load_target(TargetConfig(model=f"{folder}/", device="cuda:0", dtype="float32"))
    sequences = [text(11, 1), vision.sequence(kind, 5, 9), text(7, 2), vision.sequence(kind, 2, 20, seed=1)]

    def run(given: Sequences) -> CaptureJob:
        fill = job(given)
        slot = torch.zeros(fill.layout.nbytes, dtype=torch.uint8, device="cuda:0")
        target.run([msgspec.structs.replace(fill, slot=slot)]).wait()
        fill.slot[: fill.layout.nbytes] = slot.cpu().numpy().data
        return fill

    def right(fill: CaptureJob) -> bool:
        final, begin = read(fill)["final"], 0
        for ids, brought in sequences:
            states = vision.plain(folder, ids, brought)[-1]
            if not torch.allclose(final[begin : begin + ids.size], states, atol=0.02 * float(states.abs().max())):
                return False
            begin += ids.size
        return True

    assert right(run(sequences))
    ids, brought = sequences[1]
    narrow = {**brought, "pixel_values": vision.array(payload_tensor(brought["pixel_values"])[:, 1:])}
    with pytest.raises(TargetError):
        run([(ids, narrow)])
    assert right(run(sequences)), "the target lives on"
