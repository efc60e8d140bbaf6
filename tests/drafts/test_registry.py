"""A draft from another package: found by its entry point, trained, resumed, exported and evaluated like any other."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chats import talk, write_rows, write_target
from specd.cli.main import run
from specd.drafts.registry import BUILTIN, load, names, read
from specd.drafts.suite import DraftConformance
from specd.errors import CheckpointError, ConfigError
from specd.train.journal import read as records_of

PLUGIN = Path(__file__).parents[1] / "plugin"


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Path]:
    """What `pip install` of the plug-in leaves for `importlib.metadata`, and the package on the path."""
    info = tmp_path / "site" / "specd_toy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: specd-toy\nVersion: 1.0\n")
    entries = "toy = specd_toy:ToyMethod\nlost = specd_toy.nowhere:Lost\nodd = specd_toy:json\n"
    (info / "entry_points.txt").write_text(f"[specd.drafts]\n{entries}")
    added = [str(info.parent), str(PLUGIN)]
    sys.path[:0] = added
    yield info.parent
    sys.path[:] = [path for path in sys.path if path not in added]
    sys.modules.pop("specd_toy", None)


@pytest.mark.usefixtures("installed")
class TestToy(DraftConformance):
    @pytest.fixture(autouse=True)
    def _method(self, installed: Path) -> None:
        type(self).method = load("toy")
        type(self).settings = self.method.settings()


@pytest.mark.usefixtures("installed")
def test_it_is_found_by_its_entry_point() -> None:
    assert names() == [*BUILTIN, "lost", "odd", "toy"]
    assert load("toy").title == "a toy"
    with pytest.raises(ConfigError, match=r"'lost' cannot be imported: ModuleNotFoundError"):
        load("lost")
    with pytest.raises(ConfigError, match=r"'odd' is .*without title, settings"):
        load("odd")


@pytest.mark.parametrize(("fact", "value"), [("settings", dict), ("settings", None), ("architectures", "Toy")])
@pytest.mark.usefixtures("installed")
def test_a_method_with_facts_of_other_types_is_refused(
    fact: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load("toy"), fact, value)
    with pytest.raises(
        ConfigError, match=rf"'toy' has .*{fact}=.*expected a subclass of .*Config and a tuple of names"
    ):
        load("toy")


def test_architectures_that_are_no_names_are_a_damaged_draft(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": [["x"]]}')
    with pytest.raises(CheckpointError, match=r"architectures is \[\['x'\]\], expected a list of names"):
        read(tmp_path)


def test_an_unknown_method_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "toy"]) == 2
    assert f"unknown draft method 'toy'; known here: {', '.join(BUILTIN)}" in capsys.readouterr().err


@pytest.mark.usefixtures("installed")
def test_it_trains_resumes_evaluates_and_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_target(tmp_path / "model")
    chats = [{"messages": talk(f"Question {i}?", "Hello. " * (i % 4 + 1))} for i in range(24)]
    data = write_rows(tmp_path / "chats.jsonl", *chats)
    train = [
        "--quiet", "train", "toy", "--model", str(model), "--exact", "--device", "cpu", "--data", data,
        "--set", "data.batch_tokens=128", "--set", "data.max_length=128", "--set", "train.save_every=2",
        "--set", "train.lr=0.02", "--set", f"data.cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    assert run([*train, "--output", str(tmp_path / "run"), "--set", "draft.scales=1"]) == 2
    assert "unknown field `scales` - at `$.draft`" in capsys.readouterr().err
    for output in ("whole", "cut"):
        assert run([*train, "--output", str(tmp_path / output), "--max-steps", "6"]) == 0, capsys.readouterr().err

    def journal(output: str) -> list[Any]:
        return [(record.step, record.loss) for record in records_of(tmp_path / output / "metrics.jsonl")]

    whole = journal("whole")
    assert journal("cut") == whole
    assert whole[-1][1] < whole[0][1], "it learns"
    facts = json.loads((tmp_path / "whole" / "run.json").read_bytes())
    assert (facts["draft"]["method"], facts["config"]["method"]) == ("a toy", "toy")
    # Cut back to step 4, and trained to the same end.
    for newest in (tmp_path / "cut" / "checkpoints").glob("step-00000006"):
        newest.rename(tmp_path / "gone")
    assert run([*train, "--output", str(tmp_path / "cut"), "--max-steps", "6", "--resume"]) == 0
    assert journal("cut") == whole
    draft = tmp_path / "whole" / "draft"
    assert (draft / "model.safetensors").read_bytes() == (tmp_path / "cut/draft/model.safetensors").read_bytes()
    assert type(read(draft)).__name__ == "ToyDraft"
    capsys.readouterr()
    arguments = ["eval", "--draft", str(tmp_path / "whole"), "--data", data, "--limit", "3", "--max-new-tokens", "8"]
    assert run([*arguments, "--untrained", "--device", "cpu", "--dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[name]["block_size"] for name in ("untrained", "trained")] == [2, 2]
    assert found["trained"]["result"]["identical"]
