"""`specd sweep` as a person types it: what is wrong is said before anything begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from msgspec.structs import replace

from daemons import CONTRACT, REPORT, answering
from faults import write_data
from specd.cli.main import run
from specd.cli.sweep import _again
from step_records import make_run

FILE = """
base: {data: {path: tokens.jsonl}, train.device: cpu}
runs:
  a: {method: dflash, draft: {num_layers: 1}}
  b: {method: eagle3}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path / "tokens.jsonl")
    (tmp_path / "two.yaml").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "0,gpu1"], "--devices 0,gpu1: 'gpu1' is no device: expected numbers of GPUs, as 0,1,2, or cpu"),
        (["--devices", "99"], "run a: train.device: "),
        (["--set", "draft.num_layer=2"], "run a: settings: Object contains unknown field `num_layer`"),
        (["--set", "train.lrr=2"], "did you mean train.lr?"),
        (["--set", "data.path=none.jsonl"], "run a: no data at 'none.jsonl'"),
        (["--set", "target.dtype=float32"], "target={'dtype': 'float32'}: expected none"),
        (["-m", "smollm2-135m", "-e", "ipc:///d"], "--model smollm2-135m starts a daemon here, --endpoint ipc:///d"),
        (
            ["-m", "smollm2-135m", "--set", "subscriber.endpoints=[ipc:///d]"],
            "subscriber.endpoints=['ipc:///d'] uses others",
        ),
        (["--lag-gb", "2"], "--lag-gb 2: expected --model beside it"),
        (["--preset", "none"], "preset 'none': expected one of"),
        (["-o", "begun"], "run a: 'begun/a' exists: go on with --resume, or choose another --output"),
    ],
)
def test_what_is_wrong_is_said_first(
    arguments: list[str], said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(place / "begun" / "a", steps=1)
    assert run(["-q", "sweep", "two.yaml", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("specd: error: ")
    assert {path.name for path in place.iterdir()} <= {"tokens.jsonl", "two.yaml", "begun"}


def test_a_daemon_without_room_is_refused_before_anything_is_begun(
    place: Path, endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "two.yaml").write_text(FILE.replace("eagle3", "eagle3, train.seed: 1"))
    with answering(endpoint, replace(REPORT, contract=replace(CONTRACT, num_layers=30), max_sessions=2)):
        for further in ([], ["--dry-run"]):
            assert run(["-q", "sweep", "two.yaml", "-e", endpoint, *further]) == 2
            said = capsys.readouterr().err
            assert f"{endpoint} has no room for these runs: " in said
            assert "2 trainers, where 1 of 2 are taken: specd start … --set capture." in said
    assert not (place / "runs").exists()


def test_a_dry_run_has_sizes_of_all(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = yaml.safe_load(FILE)
    data["base"]["data"] = {"max_samples": 40}  # of what comes with specd
    data["runs"]["b"]["data.batch_tokens"] = 384
    (place / "two.yaml").write_text(yaml.safe_dump(data))
    assert run(["-q", "sweep", "two.yaml", "-m", "smollm2-135m", "--dry-run", "--set", "train.max_minutes=3"]) == 0
    said = capsys.readouterr().out
    assert "a   dflash" in said
    assert "final" in said
    assert "3 min" in said
    assert "run b shares no forwards with a, as its batches are others: data.batch_tokens is 384, there 512" in said
    assert not (place / "runs").exists()


def test_the_command_that_goes_on_has_what_was_given() -> None:
    options = {"-e": ["ipc:///a.sock", "ipc:///b.sock"], "-m": [""], "--key": [], "--set": ["data.template={a: b}"]}
    assert _again(Path("two.yaml"), options) == (
        "specd sweep two.yaml -e ipc:///a.sock -e ipc:///b.sock --set 'data.template={a: b}' --resume"
    )
