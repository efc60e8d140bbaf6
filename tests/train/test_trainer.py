"""The recipe as a call: what it needs no settings for, what it refuses, and how early."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from chats import talk, write_rows, write_target
from specd.cli.main import run
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, DataConfig, RingConfig, RunConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import Embedded, embedded
from specd.data.rows import DEMO
from specd.drafts.dflash.objective import DFlash
from specd.drafts.dflash.settings import DFlashConfig
from specd.errors import CheckpointError, ConfigError, DataError, SpecdError
from specd.train.journal import read
from specd.train.measurement import read as measurements
from specd.train.owner import owned
from specd.train.trainer import train_draft

DRAFT = {"mask_token_id": 0, "num_layers": 1, "num_taps": 2, "block_size": 4, "num_anchors": 4}
TRAIN = {"max_steps": 2, "device": "cpu", "save_every": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose directory is called as a preset is."""
    return write_target(tmp_path_factory.mktemp("targets") / "Qwen3-8B", num_layers=6)


@pytest.fixture(scope="module")
def host(model: Path) -> Iterator[Embedded]:
    target = TargetConfig(model=str(model), device="cpu", threads=1)
    with embedded(DaemonConfig(target=target, ring=RingConfig(slots=6, slot_tokens=3072))) as host:
        yield host


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """What a run needs beside its data."""
    return {
        "method": "dflash", "output": str(tmp_path / "run"), "draft": DRAFT, "train": TRAIN,
        "data": {"cache_dir": str(tmp_path / "cache"), "max_samples": 40, "max_length": 512},
    }  # fmt: skip


def test_without_data_it_trains_on_the_conversations_that_come_along_and_says_so(
    host: Embedded, model: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "specd.train.preparation")
    done = train_draft(settings, host=host)
    assert done.steps == 2
    (said,) = [record.message for record in caplog.records if record.name == "specd.train.preparation"]
    for part in (DEMO, f"not {model}'s own", "--data FILE", f"specd data regenerate FILE --model {model}"):
        assert part in said
    assert "\n" not in said
    facts = json.loads((done.directory / "run.json").read_bytes())
    assert (facts["data"]["path"], facts["config"]["data"]["path"]) == (DEMO, DEMO)
    assert facts["target"]["revision"] == f"weights {facts['target']['fingerprint'].split(':')[5]}"
    assert facts["draft"]["method"].startswith("DFlash")
    assert facts["config"]["draft"] == msgspec.to_builtins(msgspec.convert(DRAFT, DFlashConfig)), (
        "those that were not given, too"
    )


def test_run_json_names_the_directory_that_was_taken(
    host: Embedded, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    del settings["output"]
    train_draft(settings, host=host)
    assert json.loads(Path("runs/dflash/run.json").read_bytes())["config"]["output"] == "runs/dflash"


def test_a_session_after_the_first_does_not_look_for_the_data(
    host: Embedded, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(write_rows(tmp_path / "a.jsonl", *({"messages": talk("Hi", "Hello. " * 9)} for _ in range(9))))
    seen: list[bool] = []

    class Reconnecting(Subscriber):
        def __init__(self, link: Any, spec: Any, **rest: Any) -> None:
            super().__init__(link, spec, **rest)
            path.rename(tmp_path / "b.jsonl")
            seen.append(spec(self.contract) == self.spec)
            (tmp_path / "b.jsonl").rename(path)

    monkeypatch.setattr("specd.train.trainer.Subscriber", Reconnecting)
    settings["data"]["path"] = path
    assert train_draft(settings | {"output": tmp_path / "run"}, host=host).directory == tmp_path / "run"
    assert seen == [True]


def test_no_memory_for_the_draft_is_one_clear_error_before_anything_is_begun(
    host: Embedded, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("specd.drafts.dflash.objective.DFlash.warm_up", full)
    with pytest.raises(
        SpecdError, match=r"no memory left on cpu for the draft.*2\.00 GiB.*train\.device.*batch_tokens"
    ):
        train_draft(settings, host=host)
    assert not Path(settings["output"]).exists()


def test_a_resumed_run_with_other_settings_is_refused_before_its_draft_is_made(
    host: Embedded, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_draft(settings, host=host)
    assert train_draft(settings, host=host, resume=True).steps == 2
    monkeypatch.setattr("specd.drafts.dflash.objective.DFlash.__init__", lambda *_: pytest.fail("it was made"))
    with pytest.raises(CheckpointError, match=r"draft\.block_size was 4, is 5: give the old values back"):
        train_draft(settings | {"draft": {**DRAFT, "block_size": 5}}, host=host, resume=True)


def test_one_command_survives_being_started_again(settings: dict[str, Any], host: Embedded) -> None:
    """--resume begins where nothing is, and a finished run needs no daemon: none is entered."""

    class Unused:
        def __enter__(self) -> Embedded:
            pytest.fail("a finished run asks for a daemon")

        def __exit__(self, *_: object) -> None: ...

    done = train_draft(settings, host=contextlib.nullcontext(host), resume=True)
    assert (done.steps, done.was_finished) == (2, False)
    for free in ({}, {"train": {**TRAIN, "save_every": 1}}, {"subscriber": {"depth": 1, "endpoints": ["ipc:///none"]}}):
        again = train_draft(settings | free, host=Unused(), resume=True)
        assert again == done._replace(was_finished=True)
    assert not [*done.directory.glob(".lock")]
    with pytest.raises(CheckpointError, match=r"train.lr was .*give the old values back"):
        train_draft(settings | {"train": TRAIN | {"lr": 1e-9}}, host=host, resume=True)
    with pytest.raises(CheckpointError, match=r"data\.packing was 'anew', is 'fixed': give the old values back"):
        train_draft(settings | {"data": settings["data"] | {"packing": "fixed"}}, host=host, resume=True)
    with pytest.raises(DataError, match="no data at 'none'"):
        train_draft(settings | {"data": {"path": "none"}}, host=host, resume=True)
    (done.directory / "metrics.jsonl").write_bytes((done.directory / "metrics.jsonl").read_bytes() * 2)
    with pytest.raises(CheckpointError, match="line 3 is step 1, expected step 3"):
        train_draft(settings, host=Unused(), resume=True)


def test_a_finished_run_without_its_draft_exports_it_again(settings: dict[str, Any], host: Embedded) -> None:
    done = train_draft(settings, host=host)
    shutil.rmtree(done.draft)
    assert train_draft(settings, host=host, resume=True) == done
    assert (done.draft / "model.safetensors").is_file()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_trainer_is_told_who_trains_there(settings: dict[str, Any], resume: bool) -> None:
    with (
        owned(Path(settings["output"])),
        pytest.raises(ConfigError, match=rf"process {os.getpid()} on \S+ trains in '.*run': wait for its end"),
    ):
        train_draft(settings | {"subscriber": {"endpoints": ["ipc:///none"]}}, resume=resume)


def test_the_directory_is_owned_from_before_the_target_is_loaded_until_the_draft_is_exported(
    host: Embedded, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    output = Path(settings["output"])

    @contextlib.contextmanager
    def hosting() -> Iterator[Embedded]:
        seen.append((output / ".lock").read_text())
        yield host

    def exported(self: DFlash, path: Path, files: Any) -> None:
        seen.append((output / ".lock").read_text())
        path.mkdir()

    monkeypatch.setattr(DFlash, "export", exported)
    train_draft(settings, host=hosting())
    assert seen == [f"{os.getpid()} {socket.gethostname()}\n"] * 3, "of the last checkpoint, too"
    assert not (output / ".lock").exists()


@pytest.mark.parametrize(("size", "refused"), [("2", True), (" 16 ", True), ("1", False), ("", False), ("many", False)])
def test_one_of_several_processes_without_the_rest_of_a_launcher_is_refused(
    host: Embedded, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, size: str, refused: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    if not refused:
        train_draft(settings, host=host)
        return
    with pytest.raises(
        ConfigError,
        match=rf"WORLD_SIZE={size.strip()} in the environment and no RANK, MASTER_ADDR, MASTER_PORT: ",
    ):
        train_draft(settings, host=host)
    assert not Path(settings["output"]).exists()


def test_with_data_it_says_nothing_of_it(
    host: Embedded, tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(tmp_path / "a.jsonl", *({"messages": talk("Hi", "Hello. " * 9)} for _ in range(9)))
    settings["data"]["path"] = path
    train_draft(settings, host=host)
    assert not [record for record in caplog.records if record.name == "specd.train.preparation" and record.levelno > 20]


def test_rows_are_held_out_measured_and_the_best_draft_exported(
    host: Embedded, settings: dict[str, Any], tmp_path: Path
) -> None:
    """And none by a run that began before there were any: it goes on with all of its rows."""
    rows = ({"messages": talk("Hi", f"Hello. {number} " * 9)} for number in range(30))
    settings["data"] |= {"path": write_rows(tmp_path / "a.jsonl", *rows), "batch_tokens": 600}
    settings["train"] = TRAIN | {"lr": 0.5, "max_steps": 40, "keep": 1}
    settings["validation"] = {"share": 0.1, "every": 2, "patience": 2}
    done = train_draft(settings, host=host)
    found, steps = measurements(done.directory / "validation.jsonl"), read(done.directory / "metrics.jsonl")
    facts = json.loads((done.directory / "run.json").read_bytes())
    assert facts["data"]["held out for validation"] == "3 rows, 3 samples"
    trained = {sample for step in steps for batch in step.batches for sample in batch.samples}
    assert len(trained) == 27
    assert (found[-1].step, found[-1].waited) == (len(steps), 2), "a learning rate that is too high"
    best = load_file(done.directory / "checkpoints" / "best" / "model.safetensors")
    assert found[-1].best_step == int((done.directory / "checkpoints" / "best").readlink().name[5:]) < done.steps < 40
    exported = load_file(done.draft / "model.safetensors")
    name = next(name for name in exported if name in best)
    assert torch.equal(exported[name], best[name].to(exported[name].dtype))
    assert train_draft(settings, host=host, resume=True).was_finished
    old = settings | {"output": str(tmp_path / "old"), "train": TRAIN, "validation": {"share": 0}}
    train_draft(old, host=host)
    facts = json.loads((tmp_path / "old" / "run.json").read_bytes())
    del facts["config"]["validation"], facts["finished"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(facts))
    for state in (tmp_path / "old" / "checkpoints").glob("step-*/state.json"):
        stored = json.loads(state.read_bytes())
        del stored["identity"]["settings"]["validation.share"]
        state.write_text(json.dumps(stored))
    del old["validation"]
    assert train_draft(old, host=host, resume=True).steps == 2
    with pytest.raises(CheckpointError, match=r"validation\.share was 0\.0, is 0\.1"):
        train_draft(old | {"validation": {"share": 0.1}}, host=host, resume=True)


def test_a_draft_is_decoded_as_it_is_trained(
    host: Embedded, model: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a session of its own, beside the run's, which is in no share: nothing is kept for it, nobody waits for it."""
    shares: list[str] = []

    def subscriber(link: SubscriberConfig, *rest: Any, **more: Any) -> Subscriber:
        shares.append(link.share)
        return Subscriber(link, *rest, **more)

    monkeypatch.setattr("specd.train.trainer.Subscriber", subscriber)
    settings["subscriber"] = {"share": "s"}
    rows = ({"messages": talk(f"Question {number}?", f"Hello. {number} " * 9)} for number in range(30))
    settings["data"] |= {"path": write_rows(tmp_path / "a.jsonl", *rows), "batch_tokens": 600}
    settings["train"] = TRAIN | {"max_steps": 5}
    settings["validation"] = {"share": 0.1, "every": 9, "decode_every": 2, "prompts": 2, "max_new_tokens": 12}
    done = train_draft(settings, host=host)
    found = measurements(done.directory / "validation.jsonl")
    assert [one.step for one in found] == [2, 4, 5]
    assert all(one.acceptance_length is not None and one.acceptance_length >= 1 for one in found)
    assert not [*done.directory.glob(".decoded-*")]
    assert shares == ["s", ""]
    other = settings | {"output": str(tmp_path / "other"), "validation": settings["validation"] | {"share": 0}}
    with pytest.raises(ConfigError, match=r"validation\.decode_every=2: no rows are held out"):
        train_draft(other, host=host)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"draft": {**DRAFT, "block_sise": 4}}, r"unknown field `block_sise` - at `\$\.draft`"),
        ({"data": {"path": "no/such/file.jsonl"}}, "no data at 'no/such/file.jsonl'"),
        ({"data": {"max_length": 1}}, r"data\.max_length=1"),
        ({"data": {"max_batch_sequences": -1}}, r"data\.max_batch_sequences=-1: expected"),
        ({"draft": {**DRAFT, "mask_token_id": 10**6}}, r"draft\.mask_token_id=1000000: expected a token of .*Qwen3-8B"),
        ({"draft": {**DRAFT, "loss_decay": -3}}, r"draft\.loss_decay -3"),
        ({"draft": {**DRAFT, "num_heads": 6, "num_kv_heads": 4}}, "num_heads 6 is not a multiple of num_kv_heads 4"),
        ({"draft": {**DRAFT, "sliding_window": 3}}, "sliding_window 3 is shorter than a block of 4"),
        ({"subscriber": {"transport": "pigeon"}}, r"subscriber\.transport='pigeon': expected one of auto, inproc, "),
        ({"target": {"dtype": "float16"}}, r"target=\{'dtype': 'float16'\}: expected none.*specd\.embedded"),
        ({"draft": {"block_size": object()}}, "expected numbers, strings, paths"),
        ({"train": {**TRAIN, "device": "cuda:99"}}, r"train\.device"),
        ({"method": "eagle9"}, "unknown draft method 'eagle9'"),
        ({"draft": {**DRAFT, "init": "/nowhere"}}, "'/nowhere' is no draft directory"),
    ],
)
def test_what_can_be_checked_is_before_a_transport_is_attached(
    host: Embedded,
    settings: dict[str, Any],
    change: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("specd.client.handshake.load", lambda name: pytest.fail(f"{name} was attached"))
    with pytest.raises((ConfigError, DataError, CheckpointError), match=message):
        train_draft(settings | change, host=host)
    assert not Path(settings["output"]).exists(), "nothing is begun"


def test_and_before_a_target_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The directory's name picks no recipe, with whose mask token this would begin to load."""
    monkeypatch.setattr("specd.daemon.serve.embedded", lambda settings: pytest.fail("it was loaded"))
    command = ["train", "dflash", "--model", str(model), "--output", str(tmp_path / "run"), "--device", "cpu"]
    assert run(command) == 2
    assert f"no mask token is known for target '{model}'" in capsys.readouterr().err
    assert run([*command, "--preset", "smollm2-135m", "--data", "missing.jsonl"]) == 1
    assert "no data at 'missing.jsonl'" in capsys.readouterr().err
    assert run([*command, "--preset", "smollm3"]) == 2
    assert "preset 'smollm3': expected one of Llama-3.1-8B-Instruct" in capsys.readouterr().err
    assert run([*command, "--set", "draft.mask_token_id=2"]) == 2
    assert "draft.mask_token_id=2: it is the tokenizer's eos_token, '<|im_end|>'" in capsys.readouterr().err


def test_a_recipe_of_another_preset_is_taken_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--quiet", "train", "dflash", "--model", str(model), "--output", str(tmp_path / "run"), "--device", "cpu",
        "--preset", "smollm2-135m", "--max-steps", "1", "--set", "data.max_samples=20", "--set", "draft.num_taps=2",
        "--set", "draft.mask_token_id=0",
    ]  # fmt: skip
    assert run(command) == 0, capsys.readouterr().err
    config = json.loads((tmp_path / "run" / "run.json").read_bytes())["config"]
    assert (config["draft"]["block_size"], config["data"]["path"]) == (8, DEMO)


def test_a_run_config_is_taken_as_it_is(host: Embedded, tmp_path: Path) -> None:
    config = RunConfig(
        method="dflash", output=str(tmp_path / "run"), draft={"num_taps": 2}, data=DataConfig(max_samples=4)
    )
    for resume in (False, True):
        with pytest.raises(ConfigError, match="no mask token is known"):
            train_draft(config, host=host, resume=resume)
        assert not (tmp_path / "run").exists(), "nothing is begun"


def test_a_mask_token_that_is_in_the_data_is_refused_before_the_run_begins(
    host: Embedded, settings: dict[str, Any], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "a.jsonl", *[{"input_ids": [5, 9, 6, 9] * 4, "loss_mask": [1] * 16}] * 3)
    settings["data"]["path"] = path
    with pytest.raises(ConfigError, match=r"draft\.mask_token_id=9: the data has this token 24 times, first in row 1"):
        train_draft(settings | {"draft": {**DRAFT, "mask_token_id": 9}}, host=host)
    assert not Path(settings["output"]).exists()


def test_bad_rows_are_in_the_facts_and_in_the_report(host: Embedded, settings: dict[str, Any], tmp_path: Path) -> None:
    good = {"messages": talk("Hi", "Hello. " * 9)}
    settings["data"]["path"] = write_rows(tmp_path / "a.jsonl", good, {"messages": []}, good, good)
    with pytest.raises(DataError, match="1 of 4 rows cannot be used"):
        train_draft(settings, host=host)
    settings["data"]["bad_rows"] = "skip"
    done = train_draft(settings, host=host)
    facts = json.loads((done.directory / "run.json").read_bytes())["data"]
    assert (facts["rows"], facts["samples"], facts["left out, cannot be used"]) == ("4", "3", 1)
    (said,) = [value for name, value in facts.items() if name.startswith("cannot be used: ")]
    assert said.startswith("1, the first: a.jsonl line 2")
    assert run(["report", str(done.directory)]) == 0
    assert "a.jsonl line 2" in (done.directory / "report.html").read_text()


def test_every_epoch_of_fixed_packs_trains_the_same_batches_also_when_resumed(
    host: Embedded, settings: dict[str, Any]
) -> None:
    fixed = {"data": settings["data"] | {"packing": "fixed"}, "train": TRAIN | {"epochs": 2, "max_steps": 0}}
    longer = settings | fixed | {"train": fixed["train"] | {"epochs": 3}}
    train_draft(settings | fixed, host=host)
    done = train_draft(longer, host=host, resume=True)
    packs: dict[int, list[tuple[int, ...]]] = {}
    for record in read(done.directory / "metrics.jsonl"):
        for batch in record.batches:
            packs.setdefault(batch.epoch, []).append(batch.samples)
    first, second, third = packs.values()
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third
