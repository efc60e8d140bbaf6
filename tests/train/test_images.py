"""Training on images: from rows that name them to a draft, by the command line, with the target in its process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vision
from chats import write_rows
from specd.cli.main import run
from specd.config.settings import DaemonConfig, RingConfig, TargetConfig
from specd.daemon.serve import embedded
from specd.errors import ConfigError
from specd.train.directory import RunDirectory
from specd.train.journal import read
from specd.train.trainer import train_draft

DRAFT = {"mask_token_id": 0, "num_layers": 1, "num_taps": 2, "block_size": 4, "num_anchors": 4}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision.write_chat(tmp_path_factory.mktemp("target"), "qwen3_vl")


def rows(folder: Path, seed: int) -> Path:
    """Conversations about an image, and some without."""
    vision.png(folder / "one.png", seed=seed)
    image, text = {"type": "image", "image": "one.png"}, {"type": "text", "text": "what is it?"}
    answer = {"role": "assistant", "content": "a house with a red roof and two doors"}
    talks = [[image, text], [text, image], [text], [image, image, text]] * 2
    found = ({"messages": [{"role": "user", "content": parts}, answer]} for parts in talks)
    return Path(write_rows(folder / "rows.jsonl", *found))


def losses(target: Path, folder: Path, seed: int) -> list[float | None]:
    folder.mkdir()
    file = rows(folder, seed)
    settings = [f"--set=draft.{key}={value}" for key, value in DRAFT.items()]
    assert not run([
        "train", "dflash", "--model", str(target), "--data", str(file), "--output", str(folder / "run"), *settings,
        f"--set=data.cache_dir={folder / 'cache'}", "--set=data.batch_tokens=160", "--set=data.max_length=120",
        "--set=train.epochs=1", "--set=train.device=cpu", "--set=train.save_every=0",
        "--set=target.backend=transformers",
    ])  # fmt: skip
    assert not (folder / "run" / "draft" / "preprocessor_config.json").exists()
    assert (folder / "run" / "draft" / "tokenizer.json").exists()
    return [step.loss for step in read(RunDirectory(folder / "run").journal)]


def test_a_draft_is_trained_on_what_the_target_makes_of_the_images(target: Path, tmp_path: Path) -> None:
    one, again, other = (losses(target, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert len(one) > 1
    assert one == again
    assert one != other, "the images alone are others"


def test_a_daemon_that_takes_too_few_is_named_before_training(target: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "method": "dflash", "output": str(tmp_path / "run"), "draft": DRAFT, "train": {"device": "cpu"},
        "data": {"path": str(rows(tmp_path, 0)), "cache_dir": str(tmp_path / "cache"), "max_length": 120},
    }  # fmt: skip
    config = DaemonConfig(
        target=TargetConfig(model=f"{target}/", device="cpu"), ring=RingConfig(slots=4, slot_tokens=3072, payload_mib=1)
    )
    with embedded(config) as host, pytest.raises(ConfigError, match=r"may bring \d+ MiB, and a daemon takes 1 "):
        train_draft(settings, host=host)


def test_show_names_the_images_of_a_row(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = rows(tmp_path, 0)
    assert not run(["data", "show", str(file), "--row", "4", "--model", str(target)])
    shown = capsys.readouterr().out
    assert shown.count("image one.png: 6 tokens") == 2
