"""Tiny random models that read images, and sequences with images for them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from causal_lms import HIDDEN as HIDDEN
from causal_lms import VOCAB, tiny
from chats import write_tokenizer
from specd.protocol import payload
from specd.targets.base import payload_tensor as payload_tensor

IMAGE, VIDEO, START, END = 250, 251, 252, 253
"""Token ids: of a piece of an image or a video, and around it."""
TOKENS = {
    "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START,
    "vision_end_token_id": END, "boi_token_index": START, "eoi_token_index": END,
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {"out_hidden_size": HIDDEN, "fullatt_block_indexes": [1]},
    "qwen3_vl": {"out_hidden_size": HIDDEN, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    "qwen3_5": {"out_hidden_size": HIDDEN, "num_position_embeddings": 16, "deepstack_visual_indexes": []},
    "gemma3": {"image_size": 32, "patch_size": 8},
}
"""Kinds of models, and what the encoder of each has of its own."""
LAYER_TYPES = ["linear_attention", "linear_attention", "full_attention"] * 2
GRID = (1, 4, 6)
"""Patches of an image: frames, rows, columns; four of a frame are one token."""


def write(kind: str, folder: Path, **changes: Any) -> Path:
    """A checkpoint of a tiny model of `kind` with random weights. changes: of its token ids; vocab_size."""
    own: dict[str, Any] = {key: value for key, value in TOKENS.items() if hasattr(CONFIG_MAPPING[kind](), key)}
    own |= {key: value for key, value in changes.items() if key in own}
    if kind == "gemma3":
        own["mm_tokens_per_image"] = 4
    config = tiny(CONFIG_MAPPING[kind], own)
    for key, value in VISION[kind].items():
        setattr(config.vision_config, key, value)
    text = config.text_config
    text.vocab_size = changes.get("vocab_size", VOCAB)
    text.pad_token_id = 0
    if kind == "qwen3_5":
        text.layer_types, text.full_attention_interval = LAYER_TYPES, 3
        text.partial_rotary_factor = 0.5
        text.rope_parameters = {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        }  # fmt: skip
    elif kind.startswith("qwen"):
        text.rope_parameters = {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": kind == "qwen3_vl",
            "mrope_section": [4, 2, 2] if kind == "qwen3_vl" else [2, 3, 3],
        }  # fmt: skip
    torch.manual_seed(0)
    factory: Any = transformers.AutoModelForImageTextToText
    model = factory.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that writes images as Qwen's do."""


def write_chat(folder: Path, kind: str = "qwen2_5_vl") -> Path:
    """The same with a tokenizer, a chat template and an image processor."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(write_tokenizer(folder, CHAT))
    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.save_pretrained(folder)
    ids: Any = tokenizer.convert_tokens_to_ids(names)
    start, end, image, video = ids
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14 if kind == "qwen2_5_vl" else 16,
                "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 784, "max_pixels": 12845056}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return write(
        kind, folder, vocab_size=len(tokenizer), vision_start_token_id=start, vision_end_token_id=end,
        image_token_id=image, video_token_id=video,
    )  # fmt: skip


def png(path: Path | None = None, size: tuple[int, int] = (84, 56), seed: int = 0) -> bytes:
    """An image of noise, written to `path` if there is one."""
    from PIL import Image

    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(noise).save(stream, "png")
    if path is not None:
        path.write_bytes(stream.getvalue())
    return stream.getvalue()


def array(values: torch.Tensor) -> payload.Array:
    """A tensor as an array of a payload."""
    dtype: Any = str(values.dtype).removeprefix("torch.")
    return payload.Array(dtype=dtype, shape=tuple(values.shape), data=memoryview(values.contiguous().numpy().tobytes()))


def sequence(kind: str, before: int, after: int, seed: int = 0) -> tuple[NDArray[np.int32], payload.Payload]:
    """The tokens of a sequence with one image, and what it brings."""
    rng = np.random.default_rng(seed)
    pieces = 4 if kind == "gemma3" else GRID[1] * GRID[2] // 4
    tokens = np.concatenate(
        [rng.integers(3, 240, before), [START], [IMAGE] * pieces, [END], rng.integers(3, 240, after)]
    ).astype(np.int32)
    generator = torch.Generator().manual_seed(seed)
    types = torch.from_numpy(tokens[None] == IMAGE).to(torch.int64)
    if kind == "gemma3":
        pixels = torch.randn(1, 3, 32, 32, generator=generator)
        return tokens, {"pixel_values": array(pixels), "token_type_ids": array(types)}
    patch = 14 if kind == "qwen2_5_vl" else 16
    pixels = torch.randn(GRID[1] * GRID[2], 3 * 2 * patch * patch, generator=generator)
    return tokens, {
        "pixel_values": array(pixels),
        "image_grid_thw": array(torch.tensor([GRID])),
        "mm_token_type_ids": array(types),
    }


def joined(one: payload.Payload, other: payload.Payload) -> payload.Payload:
    """What a sequence of two brings, one behind the other."""
    return {
        name: array(torch.cat([payload_tensor(each[name]) for each in (one, other)], dim=int(name.endswith("ids"))))
        for name in one
    }


def plain(folder: Path, tokens: NDArray[np.int32], brought: payload.Payload) -> list[torch.Tensor]:
    """The states after each layer [T, H], the last one normed, as transformers has them for one sequence."""
    factory: Any = transformers.AutoModelForImageTextToText
    model = factory.from_pretrained(folder, dtype=torch.float32).eval()
    arguments = {name: payload_tensor(values) for name, values in brought.items()}
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(tokens.astype(np.int64))[None],
            use_cache=False,
            output_hidden_states=True,
            **arguments,
        )
    return [rows[0] for rows in output.hidden_states[1:]]


assert max(TOKENS.values()) < VOCAB
