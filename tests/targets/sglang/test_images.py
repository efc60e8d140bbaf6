"""Images for SGLang: positions on three axes, and what takes the place of an image's tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import vision
from causal_lms import tiny
from specd.errors import TargetError
from specd.protocol.payload import Payload
from specd.targets.base import payload_tensor
from specd.targets.sglang import images
from specd.targets.sglang.images import NAMES, Images


class Item(SimpleNamespace):
    """A MultimodalDataItem as far as it is used."""

    def set_pad_value(self) -> None:
        self.pad_value = 1000 + self.hash % 1000


VISION = SimpleNamespace(spatial_merge_size=2, temporal_patch_size=2, patch_size=14)
POINTS: dict[str, Any] = {
    "MultimodalDataItem": Item, "MultimodalInputs": SimpleNamespace, "Modality": SimpleNamespace(IMAGE="image"),
    "init_mm_embedding_cache": lambda size: None,
}  # fmt: skip


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Images:
    monkeypatch.setattr(images, "touch_points", lambda points: POINTS)
    return Images(runner())


def runner(**changes: Any) -> Any:
    """A runner of a model that reads images."""
    config = SimpleNamespace(image_token_id=vision.IMAGE, vision_config=VISION)
    settings = SimpleNamespace(model_is_mrope=True, hf_config=config)
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**vars(settings), **changes}),
        model=SimpleNamespace(get_image_feature=lambda items: None),
    )


def test_models_of_text_take_none() -> None:
    assert Images(runner(model_is_mrope=False)).names == ()
    assert Images(runner(hf_config=SimpleNamespace(image_token_id=7))).names == ()


@pytest.mark.parametrize(
    "grids", [[(1, 4, 6)], [(1, 6, 4), (1, 2, 2)], [(2, 4, 4)], [(1, 2, 10), (1, 2, 2), (1, 8, 2)]]
)
def test_positions_are_those_of_transformers(grids: list[tuple[int, int, int]]) -> None:
    config = tiny(CONFIG_MAPPING["qwen2_5_vl"], {"image_token_id": vision.IMAGE})
    factory: Any = transformers.AutoModel
    with torch.device("meta"):
        model = factory.from_config(config)
    pieces: list[np.ndarray[Any, Any]] = [np.arange(3)]
    for number, (t, h, w) in enumerate(grids):
        pieces += [np.full(t * h * w // 4, vision.IMAGE), np.arange(2 + number)]
    ids = np.concatenate(pieces).astype(np.int64)
    grid = np.array(grids)
    types = torch.from_numpy(ids[None] == vision.IMAGE).int()
    expected, _ = model.get_rope_index(torch.from_numpy(ids)[None], types, image_grid_thw=torch.from_numpy(grid))
    runs = images._runs(ids, vision.IMAGE, grid, 2)
    assert images.positions(ids.size, runs, grid, 2).tolist() == expected[:, 0].tolist()


def test_each_image_has_a_token_of_its_own_and_text_is_left_alone(reads: Images) -> None:
    assert reads.names == NAMES
    (ids, one), (_, other) = vision.sequence("qwen2_5_vl", 3, 2), vision.sequence("qwen2_5_vl", 3, 2, seed=1)
    plain = np.array([5, 6, 7], np.int32)
    tokens = np.concatenate([plain, ids, ids])
    changed, inputs, positions = reads.inputs(tokens, [3, ids.size, ids.size], [{}, one, other])
    image = tokens == vision.IMAGE
    assert changed[~image].tolist() == tokens[~image].tolist()
    assert (tokens[image] == vision.IMAGE).all(), "the trainer's are not written to"
    first, second = (set(part[part >= 1000].tolist()) for part in np.split(changed[3:], 2))
    assert len(first) == len(second) == 1
    assert first != second
    assert inputs[0] is None
    assert torch.equal(inputs[1].mm_items[0].feature, payload_tensor(one["pixel_values"]))
    assert inputs[1].mm_items[0].offsets == [(4, 9)]
    assert positions[:, :3].tolist() == [[0, 1, 2]] * 3
    assert positions.shape == (3, tokens.size)


def test_the_same_pixels_in_another_shape_are_another_image(reads: Images) -> None:
    ids, one = vision.sequence("qwen2_5_vl", 3, 2)
    turned = {**one, "image_grid_thw": vision.array(torch.tensor([[1, 6, 4]]))}
    hashes = {reads.inputs(ids, [ids.size], [each])[1][0].mm_items[0].hash for each in (one, turned, dict(one))}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pixel_values": None}, "lacks pixel_values"),
        ({"image_grid_thw": [[1, 4, 4]]}, r"\[24, 1176\] of a sequence are not the patches of image_grid_thw"),
        ({"image_grid_thw": [1, 4, 6]}, "are not the patches"),
        ({"pixel_values": [[0.5] * 99] * 24}, r"\[24, 99\] of a sequence are not the patches .* of 1176 numbers each"),
        ({"image_grid_thw": [[0, 4, 6]]}, "are not the patches"),
        ({"image_grid_thw": [[-1, -4, 6]]}, "are not the patches"),
        ({"image_grid_thw": [[1, 3, 8]]}, "are not the patches .* that 2 divides"),
        ({"image_grid_thw": [[24, 1, 1]]}, "are not the patches .* that 2 divides"),
        (
            {"image_grid_thw": [[1, 2, 6], [1, 2, 6]], "split": True},
            r"6 tokens of images, and .* asks for runs of \[3, 3\]",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(reads: Images, changes: dict[str, Any], said: str) -> None:
    ids, brought = vision.sequence("qwen2_5_vl", 3, 2)
    given: dict[str, Any] = dict(brought)
    if changes.pop("split", False):
        ids = np.concatenate([ids[:5], [9], ids[5:]]).astype(np.int32)  # within the first image
    for name, value in changes.items():
        given.pop(name)
        if value is not None:
            given[name] = vision.array(torch.tensor(value))
    payload: Payload = given
    with pytest.raises(TargetError, match=said):
        reads.inputs(ids, [ids.size], [payload])
