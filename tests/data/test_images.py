"""Images in the data: where rows name them, how many tokens they take, and what a target gets of them."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vision
from chats import write_rows, write_target
from specd.config.settings import DataConfig
from specd.data.batching import Loader
from specd.data.dataset import prepare, sample
from specd.data.faults import RowError
from specd.data.images import FOLDER, NAMES, Processor, expanded, picture
from specd.data.payloads import ImagePayloads
from specd.errors import ConfigError, DataError
from specd.protocol import payload
from specd.protocol.contract import RingInfo, TargetContract
from specd.targets.base import payload_tensor

ANSWER = {"role": "assistant", "content": "a red house"}
CONTRACT = TargetContract(
    model="tiny-vl", model_type="qwen2_5_vl", hidden_size=64, num_layers=6, vocab_size=364, dtype="float32",
    weights="w", payloads=NAMES,
)  # fmt: skip
RING = RingInfo(num_slots=4, slot_bytes=1 << 20, slot_tokens=64, payload_bytes=1 << 20)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.write_chat(tmp_path_factory.mktemp("target"))


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def row(*parts: Any, **beside: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER], **beside}


def said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def config(path: str, **settings: Any) -> DataConfig:
    return DataConfig(path=path, cache_dir=str(Path(path).parent / "cache"), processes=1, **settings)


WAYS: dict[str, Any] = {
    "transformers": lambda data: row({"type": "image", "image": "one.png"}, said("what?")),
    "a path as url": lambda data: row({"type": "image", "url": "one.png"}, said("what?")),
    "OpenAI": lambda data: row({"type": "image_url", "image_url": {"url": url(data)}}, said("what?")),
    "beside": lambda data: row({"type": "image"}, said("what?"), images=["one.png"]),
    "LLaVA": lambda data: {
        "conversations": [
            {"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a red house"},
        ],
        "image": "one.png",
    },
    "TRL": lambda data: {"messages": [{"role": "user", "content": "what?"}, ANSWER], "images": ["one.png"]},
    "a question": lambda data: {"question": "what?", "answer": "a red house", "image": url(data)},
    "a folder": lambda data: row({"type": "image", "image": "one.png"}, said("what?"), image_folder="."),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_of_naming_an_image_give_the_same_tokens_and_labels(target: Path, tmp_path: Path, way: str) -> None:
    data = vision.png(tmp_path / "one.png")  # 84 × 56: 6 × 4 patches of 14, 4 of them a token
    file = write_rows(tmp_path / "rows.jsonl", WAYS[way](data))
    tokens, mask = sample(config(file), target, 1)
    image = Processor(target).token
    assert (tokens == image).sum() == 6
    assert not mask[tokens == image].any()
    plain = row(said("what?"))
    expected = sample(config(write_rows(tmp_path / "text.jsonl", plain)), target, 1)
    assert tokens[mask].tolist() == expected[0][expected[1]].tolist()
    assert tokens.size == expected[0].size + 6 + 2  # start and end of the image


def test_payloads_are_what_the_processor_makes_and_belong_to_their_sample(target: Path, tmp_path: Path) -> None:
    first, second = vision.png(tmp_path / "one.png"), vision.png(size=(56, 112), seed=1)
    rows = [
        row({"type": "image", "image": "one.png"}, said("and"), {"type": "image", "image": url(second)}, said("what?")),
        row(said("no image")),
        row({"type": "image", "image": url(second)}, said("what?")),
    ]
    settings = config(write_rows(tmp_path / "rows.jsonl", *rows))
    dataset = prepare(settings, target)
    assert dataset.illustrated
    assert dataset.report.illustrated == 2
    assert [len(dataset.pictures(i)) for i in range(3)] == [2, 0, 1]
    assert prepare(settings, target).pictures(0) == dataset.pictures(0), "from the cache"
    images = ImagePayloads(dataset, target, CONTRACT)
    assert images.of(1) == b""
    both, one = (payload.unpack(images.of(i)) for i in (0, 2))
    assert sorted(both) == sorted(NAMES)
    grid = payload_tensor(both["image_grid_thw"])
    assert grid.tolist() == [[1, 4, 6], [1, 8, 4]]
    pixels = payload_tensor(both["pixel_values"])
    assert torch.equal(pixels[24:], payload_tensor(one["pixel_values"])), "the same image"
    types = payload_tensor(both["mm_token_type_ids"])
    assert torch.equal(types[0] == 1, torch.from_numpy(dataset.tokens(0) == Processor(target).token))
    half = ImagePayloads(dataset, target, _with(dtype="bfloat16"))
    assert torch.equal(payload_tensor(payload.unpack(half.of(0))["pixel_values"]), pixels.bfloat16())
    loader = Loader(dataset, dataset.plan(settings, 0), payloads=images)
    for batch in loader:
        assert batch.payloads == tuple(images.of(i) for i in batch.samples)
    alone = Loader(dataset, dataset.plan(settings, 0))
    assert [batch.samples for batch in loader] == [batch.samples for batch in alone]
    assert first


def test_the_identity_of_samples_is_what_their_images_show_wherever_they_lie(target: Path, tmp_path: Path) -> None:
    digests = []
    for folder, name, seed in (("a", "one.png", 0), ("b", "two.png", 0), ("c", "one.png", 1)):
        (tmp_path / folder).mkdir()
        vision.png(tmp_path / folder / name, seed=seed)
        file = write_rows(tmp_path / folder / "rows.jsonl", row({"type": "image", "image": name}, said("what?")))
        digests.append(prepare(config(file), target).digest)
    assert digests[0] == digests[1] != digests[2]


def _with(**changes: Any) -> TargetContract:
    import msgspec

    return msgspec.structs.replace(CONTRACT, **changes)


def test_another_file_under_the_same_name_is_noticed(target: Path, tmp_path: Path) -> None:
    vision.png(tmp_path / "one.png")
    file = write_rows(tmp_path / "rows.jsonl", row({"type": "image", "image": "one.png"}, said("what?")))
    images = ImagePayloads(prepare(config(file), target), target, CONTRACT)
    assert images.of(0)
    vision.png(tmp_path / "one.png", seed=1)
    with pytest.raises(DataError, match=r"one\.png is another than when the data was prepared; put the old one back"):
        images.of(0)
    (tmp_path / "one.png").unlink()
    with pytest.raises(DataError, match=r"one\.png: No such file"):
        images.of(0)


@pytest.mark.parametrize(
    ("contract", "ring", "said"),
    [
        ({"payloads": ()}, RING, "1 samples have images, and tiny-vl takes text alone here: .*--backend transformers"),
        ({"payloads": ("pixel_values",)}, RING, "takes no image_grid_thw, mm_token_type_ids"),
        ({}, RingInfo(num_slots=4, slot_bytes=99, slot_tokens=64), r"may bring 2 MiB, and a daemon takes 0 .*mib=2"),
    ],
)
def test_a_target_or_daemon_that_takes_no_such_images_is_refused_before_training(
    target: Path, tmp_path: Path, contract: dict[str, Any], ring: RingInfo, said: str
) -> None:
    rows = [row({"type": "image", "image": url(vision.png())}, {"type": "text", "text": "what?"})]
    dataset = prepare(config(write_rows(tmp_path / "rows.jsonl", *rows)), target)
    wanted = _with(**contract)
    images = ImagePayloads(dataset, target, wanted)
    with pytest.raises(ConfigError, match=said):
        images.check(wanted, [ring, ring], 64)
    enough = RingInfo(num_slots=4, slot_bytes=99, slot_tokens=64, payload_bytes=2 << 20)
    for rings in ([ring, enough], []):
        images.check(CONTRACT, rings, 64)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "gone": (row({"type": "image", "image": "none.png"}), r"the image 'none\.png' cannot be read in .*No such file"),
    "endless": (row({"type": "image", "image": "/dev/zero"}), r"'/dev/zero' cannot be read in .*it is no file"),
    "web": (row({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}), "expected the path of a file"),
    "no base64": (row({"type": "image", "image": "data:image/png;base64,§"}), "is no data: URL in base64"),
    "no image": (row({"type": "image", "image": url(b"text")}), "is none that can be used"),
    "one too many": (row({"type": "image"}, images=["a.png", "b.png"]), "2 images beside the turns, and 1 places"),
    "in an answer": (
        {"messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [{"type": "image"}]}]},
        "turn 2 has content of type 'image'; expected text alone in an answer",
    ),
    "sound": (row({"type": "input_audio"}), "content of type 'input_audio'; expected text and images"),
    "its token in the text": (
        row({"type": "image", "image": url(vision.png())}, said("<|image_pad|>")),
        "the chat template writes 2 places for 1 images",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_images_that_cannot_be_used_are_named_with_their_row(target: Path, tmp_path: Path, fault: str) -> None:
    bad, said = BAD[fault]
    file = write_rows(tmp_path / "rows.jsonl", bad)
    with pytest.raises(RowError, match=rf"rows\.jsonl line 1: .*{said}"):
        sample(config(file), target, 1)


def test_an_image_is_not_cut(target: Path, tmp_path: Path) -> None:
    vision.png(tmp_path / "one.png")
    image = {"type": "image", "image": "one.png"}
    file = write_rows(tmp_path / "rows.jsonl", row(image, said("what?")))
    size = sample(config(file), target, 1)[0].size
    assert prepare(config(file, max_length=size - 1), target).report.cut == 1
    with pytest.raises(DataError, match=r"its 1 images reach to token \d+, beyond data\.max_length=8"):
        prepare(config(file, max_length=8), target)


def test_a_target_without_images_is_named(tmp_path: Path) -> None:
    text = write_target(tmp_path / "text", template=vision.CHAT)
    rows = [row({"type": "image", "image": url(vision.png())}, said("what?"))]
    with pytest.raises(DataError, match=r"the target \(llama\) has no preprocessor_config\.json or image_token_id"):
        sample(config(write_rows(tmp_path / "rows.jsonl", *rows)), text, 1)
    file = vision.write_chat(tmp_path / "vl") / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    with pytest.raises(DataError, match="does not know how many tokens they take for qwen2_5_vl"):
        Processor(tmp_path / "vl")


def test_tokens_of_images_are_no_labels_and_others_keep_theirs() -> None:
    tokens, mask = expanded(np.array([1, 9, 2, 9], np.int32), np.array([True, True, False, True]), (2, 3), 9, "here")
    assert tokens.tolist() == [1, 9, 9, 2, 9, 9, 9]
    assert mask.tolist() == [True] + [False] * 6
    with pytest.raises(RowError, match="2 places for 1 images"):
        expanded(np.array([9, 9], np.int32), np.zeros(2, np.bool_), (2,), 9, "here")


def test_a_path_without_a_folder_is_refused_and_tables_bring_bytes() -> None:
    with pytest.raises(RowError, match=f"column `{FOLDER}`"):
        picture("one.png", "", "row 1")
    found = picture({"bytes": b"abc", "path": "cat.png"}, "", "row 1")
    assert (found.name, found.read()) == ("cat.png", b"abc")
