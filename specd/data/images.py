"""Images of conversations: where they are, how many tokens each takes, and what a target gets of them."""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from specd.data.faults import RowError, short
from specd.errors import DataError, first_line, missing_extra
from specd.protocol import payload
from specd.protocol.payload import Array

PLACE = "\ufdd0"
"""What stands for an image in the text of a turn: a code that Unicode keeps for no character."""
KINDS = ("image", "image_url", "input_image")
"""Types of the parts of a turn that are images."""
NAMES = ("image_grid_thw", "mm_token_type_ids", "pixel_values")
"""What a sequence with images brings for its target."""
FOLDER = "image_folder"
"""The column of a row that says where its relative paths begin."""
_FEW = 400
"""Characters of a path at most; longer strings are no paths."""


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """An image of a row. name: for people. path: of its file, or data: its bytes. digest: of these bytes."""

    name: str
    digest: bytes
    path: str = ""
    data: bytes = b""

    def read(self) -> bytes:
        """Its bytes. Raises DataError when the file is gone, or is another than when the data was prepared."""
        if not self.path:
            return self.data
        try:
            found = _bytes(Path(self.path))
        except OSError as error:
            raise DataError(f"image {self.path}: {error.strerror}; put it back, or prepare the data anew") from None
        if _digest(found) != self.digest:
            raise DataError(
                f"image {self.path} is another than when the data was prepared; put the old one back, or prepare the "
                f"data anew, with another data.cache_dir"
            )
        return found


def in_part(part: Mapping[str, Any]) -> Any:
    """The source of an image in a part of a turn, as OpenAI and transformers write them; None for a bare part."""
    for key in ("image", "image_url", "url", "path", "base64"):
        if (found := part.get(key)) is not None:
            found = found.get("url") if isinstance(found, dict) and "url" in found else found
            return f"data:;base64,{found}" if key == "base64" else found
    return None


def picture(source: Any, folder: str, where: str) -> Picture:
    """The image at `source`: a path, from `folder` on, a file: or data: URL, or a table's {bytes, path}.

    Raises RowError for what is none, or cannot be read.
    """
    if isinstance(source, dict) and isinstance(source.get("bytes"), bytes):
        data = source["bytes"]
        return Picture(name=str(source.get("path") or "in the row"), digest=_digest(data), data=data)
    if isinstance(source, dict):
        source = source.get("path")
    if isinstance(source, str) and source.startswith("data:"):
        head, _, body = source.partition(",")
        try:
            data = base64.b64decode(body, validate=True) if head.endswith(";base64") else b""
        except (binascii.Error, ValueError):
            data = b""
        if not data:
            raise _unread(where, f"{source[:40]}… is no data: URL in base64")
        return Picture(name=f"{head.removeprefix('data:').partition(';')[0] or 'data'} in the row",
                       digest=_digest(data), data=data)  # fmt: skip
    if not isinstance(source, str) or not source or len(source) > _FEW or "://" in source.removeprefix("file://"):
        raise _unread(where, f"an image is {short(source)}; expected the path of a file, or a data: URL")
    path = Path(os.path.expanduser(source.removeprefix("file://")))
    if not path.is_absolute():
        if not folder:
            raise _unread(where, f"the image {source!r} has no folder; give whole paths, or a column `{FOLDER}`")
        path = Path(folder, path)
    try:
        return Picture(name=source, digest=_digest(_bytes(path)), path=str(path.resolve()))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no path"
        raise _unread(where, f"the image {source!r} cannot be read in {folder or '/'}: {reason}") from None


def _unread(where: str, detail: str) -> RowError:
    return RowError(where, "an image that cannot be read", detail)


class Processor:
    """What the target's own image processor makes of images, for the model whose files lie in `directory`.

    token: the id that stands for a piece of an image. Raises DataError for a model that specd knows no images of.
    """

    def __init__(self, directory: Path) -> None:
        config = _json(directory / "config.json")
        token = config.get("image_token_id")
        if not isinstance(token, int) or not (directory / "preprocessor_config.json").is_file():
            raise DataError(
                f"the data has images, and the target ({config.get('model_type')}) has no preprocessor_config.json or "
                f"image_token_id to read them by; train on text, or take a target that reads images"
            )
        self.token: int = token
        self._processor = _load(directory)
        if not all(hasattr(self._processor, name) for name in ("merge_size", "get_number_of_image_patches")):
            raise DataError(
                f"the data has images, and specd does not know how many tokens they take for "
                f"{config.get('model_type')} ({type(self._processor).__name__}); expected a model as Qwen2.5-VL, "
                f"Qwen3-VL or Qwen3.5"
            )
        self._merged = int(self._processor.merge_size) ** 2

    def count(self, picture: Picture, where: str) -> tuple[int, tuple[int, int]]:
        """How many tokens an image takes, and its width and height. Raises RowError for what is no image."""
        try:
            image = _opened(picture.read())
            patches = self._processor.get_number_of_image_patches(image.height, image.width, {})
        except Exception as error:  # noqa: BLE001  Pillow and processors raise what they like
            raise _unread(where, f"the image {picture.name} is none that can be used: {first_line(error)}") from None
        return int(patches) // self._merged, image.size

    def bytes_per_token(self, dtype: str) -> int:
        """Bytes that a token of an image brings for a target of `dtype`."""
        config = self._processor
        patch = 3 * int(config.temporal_patch_size) * int(config.patch_size) ** 2
        return self._merged * patch * payload.ITEM_BYTES[dtype] + 64

    def payload(self, pictures: Sequence[Picture], tokens: NDArray[np.int32], dtype: str) -> bytes:
        """What a sequence of `tokens` with these images brings for a target of `dtype`. Raises DataError."""
        try:
            found = self._processor(images=[_opened(one.read()) for one in pictures], return_tensors="pt")
        except DataError:
            raise
        except Exception as error:
            names = ", ".join(one.name for one in pictures)
            raise DataError(f"the target's processor cannot read {names}: {first_line(error)}") from error
        arrays = {name: _array(found[name], dtype) for name in ("pixel_values", "image_grid_thw")}
        places = (tokens == self.token)[None].astype(np.int64)
        expected = int(found["image_grid_thw"].prod(dim=1).sum()) // self._merged
        if int(places.sum()) != expected:
            raise DataError(
                f"{', '.join(one.name for one in pictures)}: the target's processor makes {expected} tokens of them, "
                f"and the prepared sample has {int(places.sum())}; prepare the data anew, with another data.cache_dir"
            )
        types = Array(dtype="int64", shape=places.shape, data=places.data.cast("B"))
        return payload.pack({**arrays, "mm_token_type_ids": types})


def encode(pictures: Sequence[Picture]) -> bytes:
    """What is kept of a sample's images; nothing for none."""
    return msgspec.msgpack.encode(pictures) if pictures else b""


def content(kept: bytes) -> bytes:
    """A digest of what the images that `encode` kept show, wherever they lie."""
    return _digest(b"".join(one.digest for one in decode(kept)))


def decode(data: bytes) -> tuple[Picture, ...]:
    """The images that `encode` kept."""
    return msgspec.msgpack.decode(data, type=tuple[Picture, ...]) if data else ()


def expanded(
    tokens: NDArray[np.int32], loss_mask: NDArray[np.bool_], counts: Sequence[int], token: int, where: str
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Tokens and labels with as many tokens for each image as it takes; none of them is a label."""
    places = tokens == token
    if int(places.sum()) != len(counts):
        detail = f"the chat template writes {int(places.sum())} places for {len(counts)} images; expected one for each"
        raise RowError(where, "images without a place", detail)
    times = np.ones(tokens.size, np.int64)
    times[places] = counts
    return np.repeat(tokens, times), np.repeat(loss_mask & ~places, times)


def _load(directory: Path) -> Any:
    if importlib.util.find_spec("PIL") is None:
        raise missing_extra("pillow", "images")
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    load: Any = AutoImageProcessor.from_pretrained  # untyped
    try:
        return load(directory, local_files_only=True, trust_remote_code=False, backend="pil")
    except Exception as error:  # noqa: BLE001  it raises what it likes
        raise DataError(
            f"the target's image processor cannot be loaded ({first_line(error)}); fetch its preprocessor_config.json "
            f"again, or train on text"
        ) from None


def _opened(data: bytes) -> Any:
    from PIL import Image, ImageOps

    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def _array(values: Any, dtype: str) -> Array:
    """A tensor as an array. dtype: of its floating-point numbers."""
    import torch

    found: torch.Tensor = values.to(getattr(torch, dtype)) if values.is_floating_point() else values
    data = found.contiguous().view(-1).view(torch.uint8).numpy().data
    name: Any = str(found.dtype).removeprefix("torch.")
    return Array(dtype=name, shape=tuple(found.shape), data=data)


def _json(file: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return {}


def _bytes(path: Path) -> bytes:
    """What a file holds. Raises OSError, for a pipe or a device, too, which may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file")
    return path.read_bytes()


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
