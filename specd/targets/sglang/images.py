"""Images in SGLang's forwards: what its scheduler would hand a model beside tokens, made of what a sequence brings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from specd.errors import TargetError
from specd.protocol.payload import Payload
from specd.targets.base import patch_counts, payload_tensor
from specd.targets.sglang.touch_points import IMAGE_POINTS, touch_points
from specd.targets.sglang.versions import uses_mrope

NAMES: Final = ("image_grid_thw", "mm_token_type_ids", "pixel_values")
"""Arrays of a sequence with images, as the processors of Qwen's models make them."""

CACHE_BYTES: Final = 64 << 20
"""Of SGLang's cache of embedded images, which it cannot do without; no image comes twice in a hurry."""


class Images:
    """How the model of a runner takes images. names: of the arrays that it takes, none where it reads text alone."""

    __slots__ = ("_merge", "_patch", "_sg", "_token", "names")

    def __init__(self, runner: Any) -> None:
        """Raises ConfigError where SGLang has changed."""
        self.names: tuple[str, ...] = ()
        # Models of one axis of positions read images in ways of their own.
        if not uses_mrope(runner) or not hasattr(runner.model, "get_image_feature"):
            return
        config = runner.model_config.hf_config
        token = getattr(config, "image_token_id", None)
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
        if isinstance(token, int) and isinstance(merge, int):
            self.names, self._token, self._merge = NAMES, token, merge
            vision = config.vision_config
            self._patch = 3 * int(vision.temporal_patch_size) * int(vision.patch_size) ** 2
            self._sg = touch_points(IMAGE_POINTS)
            self._sg["init_mm_embedding_cache"](CACHE_BYTES)

    def inputs(
        self, tokens: NDArray[np.int32], lengths: Sequence[int], brought: Sequence[Payload]
    ) -> tuple[NDArray[np.int64], list[Any], NDArray[np.int64]]:
        """The tokens, with others in place of each image's, SGLang's inputs of each sequence, and positions [3, T].

        Raises TargetError for arrays that do not belong to their sequence.
        """
        ids = tokens.astype(np.int64)
        inputs: list[Any] = []
        places: list[NDArray[np.int64]] = []
        start = 0
        for length, payload in zip(lengths, brought, strict=True):
            own = ids[start : start + length]
            grids: NDArray[np.int64] = np.empty((0, 3), np.int64)
            items: list[Any] = []
            if payload:
                grids, items = self._items(own, payload)
            places.append(positions(length, _runs(own, self._token, grids, self._merge), grids, self._merge))
            for item in items:
                (first, last), *_ = item.offsets
                own[first : last + 1] = item.pad_value
            inputs.append(self._sg["MultimodalInputs"](mm_items=items, im_token_id=self._token) if items else None)
            start += length
        return ids, inputs, np.concatenate(places, axis=1)

    def _items(self, ids: NDArray[np.int64], brought: Payload) -> tuple[NDArray[np.int64], list[Any]]:
        missing = sorted(set(NAMES) - set(brought))
        if missing:
            raise TargetError(f"a sequence with images lacks {', '.join(missing)}; prepare it with the processor")
        grid, pixels = payload_tensor(brought["image_grid_thw"]), payload_tensor(brought["pixel_values"])
        counts = patch_counts(grid, pixels.shape[0]) if pixels.ndim else []
        grids: NDArray[np.int64] = grid.numpy().astype(np.int64) if counts else np.empty((0, 3), np.int64)
        if not counts or (grids[:, 1:] % self._merge).any() or tuple(pixels.shape[1:]) != (self._patch,):
            raise TargetError(
                f"pixel_values {list(pixels.shape)} of a sequence are not the patches of image_grid_thw "
                f"{grid.flatten()[:24].tolist()}, of {self._patch} numbers each, rows and columns that {self._merge} "
                f"divides; prepare it with the processor"
            )
        items = []
        for (first, end), one, part in zip(
            _runs(ids, self._token, grids, self._merge), grid, torch.split(pixels, counts), strict=True
        ):
            # SGLang's own hash, by which it keeps embedded images, leaves out the shape: blank images would meet.
            content = hashlib.blake2b(one.numpy().tobytes(), digest_size=8)
            content.update(part.contiguous().view(torch.uint8).numpy().data)
            item = self._sg["MultimodalDataItem"](
                modality=self._sg["Modality"].IMAGE,
                hash=int.from_bytes(content.digest(), "little"),
                feature=part.clone(),
                offsets=[(first, end - 1)],
                model_specific_data={"image_grid_thw": one[None].clone()},
            )
            item.set_pad_value()
            items.append(item)
        return grids, items


def _runs(ids: NDArray[np.int64], token: int, grids: NDArray[np.int64], merge: int) -> list[tuple[int, int]]:
    """Where the tokens of each image lie, [first, end). Raises TargetError where they are not as many as grids say."""
    if not grids.size:
        return []
    places = np.flatnonzero(ids == token)
    sizes = (grids.prod(axis=1) // merge**2).tolist()
    ends = np.cumsum(sizes)
    if places.size != ends[-1] or any(
        places[end - 1] - places[end - size] != size - 1 for size, end in zip(sizes, ends.tolist(), strict=True)
    ):
        raise TargetError(
            f"a sequence has {places.size} tokens of images, and image_grid_thw {grids.tolist()} asks for runs of "
            f"{sizes}; prepare it with the processor"
        )
    return [(int(places[end - size]), int(places[end - 1]) + 1) for size, end in zip(sizes, ends.tolist(), strict=True)]


def positions(length: int, runs: Sequence[tuple[int, int]], grids: NDArray[np.int64], merge: int) -> NDArray[np.int64]:
    """M-RoPE positions [3, T] of frames, rows and columns: text counts on all three, from where an image leaves off.

    An image of t frames, h rows and w columns of tokens stands at one position and takes the larger of h and w
    (Qwen2-VL, arXiv:2409.12191, section 2.1).
    """
    found = np.empty((3, length), np.int64)
    at = begin = 0
    for (first, end), (frames, rows, columns) in zip(runs, grids.tolist(), strict=True):
        found[:, begin:first] = at + np.arange(first - begin)
        at += first - begin
        h, w = rows // merge, columns // merge
        found[:, first:end] = at + np.indices((frames, h, w)).reshape(3, -1)
        at, begin = at + max(h, w), end
    found[:, begin:] = at + np.arange(length - begin)
    return found
