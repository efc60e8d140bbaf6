"""The run directory: when a run may use it, what it takes from the target, what a resumed run must share."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from specd.config.settings import DataConfig, RunConfig, StatesConfig, TrainConfig, ValidationConfig
from specd.drafts.dflash.settings import DFlashConfig
from specd.errors import CheckpointError, ConfigError, ProtocolError
from specd.protocol.contract import TEMPLATES, ArtifactRef, TargetContract
from specd.train import directory
from specd.train.checkpoint import Identity
from specd.train.directory import RunDirectory, target_files
from step_records import make_run

CONTRACT = TargetContract(
    model="tiny", model_type="llama", hidden_size=8, num_layers=6, vocab_size=64, dtype="float32", weights="abc",
    artifacts={
        "config.json": ArtifactRef(nbytes=2),
        "embedding": ArtifactRef(nbytes=2048, shape=(64, 8), dtype="float32"),
    },
)  # fmt: skip
DRAFT = DFlashConfig()


def journal(run: RunDirectory, steps: int) -> None:
    """A journal of `steps` lines; only their number matters."""
    line = (
        b'{"step":%d,"epoch":0,"batches":[],"loss":1.0,"teacher_forced_accuracy":null,"teacher_forced_by_offset":[],'
        b'"lr":0.1,"grad_norm":1.0,"weight":1.0,"tokens":1,"step_s":1.0,"target_wait_s":0.0,"wire_wait_s":0.0,'
        b'"train_s":1.0,"forward_s":0.0,"busy_slots":0,"num_slots":1}\n'
    )
    run.journal.write_bytes(b"".join(line % step for step in range(1, steps + 1)))


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_run_takes_an_empty_place_only(tmp_path: Path, resume: bool) -> None:
    """With --resume too: one command begins a run and goes on with it."""
    run = RunDirectory(tmp_path)
    assert not run.check(resume)
    for left_by_a_crash in (".lock", ".run.json.new"):
        (tmp_path / left_by_a_crash).touch()
    assert not run.check(resume)
    run.journal.touch()
    with pytest.raises(ConfigError, match=r"exists and is not empty: .*choose another --output") as refused:
        run.check(resume)
    assert ("holds no run to resume" in str(refused.value)) is resume
    assert "specd resume" not in str(refused.value), "there is no run to resume"


def test_a_run_is_resumed_and_not_overwritten(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "run.json").touch()
    with pytest.raises(ConfigError, match=f"not empty: go on with that run by `specd resume {tmp_path}`"):
        run.check(resume=False)
    assert run.check(resume=True), "it was killed before its first step"
    journal(run, 3)
    assert run.check(resume=True)
    run.journal.write_bytes(run.journal.read_bytes() * 2)
    with pytest.raises(CheckpointError, match="line 4 is step 1, expected step 4"):
        run.check(resume=True)


def test_resume_before_the_first_checkpoint_begins_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.has_checkpoint(save_every=5) is False
    journal(run, 5)
    assert run.has_checkpoint(save_every=5) is False, "killed between the line of step 5 and its checkpoint"
    assert run.has_checkpoint(save_every=0) is False
    journal(run, 6)
    with pytest.raises(CheckpointError, match="has 6 steps but there is no checkpoint"):
        run.has_checkpoint(save_every=5)
    (run.checkpoints / "step-00000005").mkdir(parents=True)
    assert run.has_checkpoint(save_every=5) is True


def test_a_run_is_finished_once_it_says_so_and_its_draft_is_there(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.finish()  # without facts it says nothing, and needs no mark
    assert run.finished() is None
    make_run(tmp_path, steps=2, evals=False)
    assert run.finished() is None
    run.finish()
    assert run.finished() is None
    run.draft.mkdir()
    facts = run.finished()
    assert facts is not None
    assert facts.finished.endswith("UTC")
    (tmp_path / "run.json").write_text("{")
    assert run.finished() is None


def test_target_files_are_written_and_tensors_are_not_fetched(tmp_path: Path) -> None:
    asked: list[str] = []

    def fetch(name: str) -> bytes:
        asked.append(name)
        return b"{}"

    assert target_files(CONTRACT, fetch, tmp_path) == {"config.json": b"{}"}
    assert (asked, [path.name for path in tmp_path.iterdir()]) == (["config.json"], ["config.json"])


def test_a_further_chat_template_is_written_where_transformers_looks(tmp_path: Path) -> None:
    name = f"{TEMPLATES}/tool_use.jinja"
    contract = msgspec.structs.replace(CONTRACT, artifacts={name: ArtifactRef(nbytes=1)})
    assert target_files(contract, lambda name: b"x", tmp_path) == {name: b"x"}
    assert (tmp_path / TEMPLATES / "tool_use.jinja").read_bytes() == b"x"


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/evil",
        "a/b",
        ".bashrc",
        "..",
        f"{TEMPLATES}/evil.py",
        f"{TEMPLATES}/.jinja",
        f"{TEMPLATES}/../a.jinja",
        f"{TEMPLATES}/a/b.jinja",
        f"../{TEMPLATES}/a.jinja",
        f"/{TEMPLATES}/a.jinja",
        f"{TEMPLATES}/",
        "a\0b",
    ],
)
def test_a_daemon_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    contract = msgspec.structs.replace(CONTRACT, artifacts={name: ArtifactRef(nbytes=1)})
    (tmp_path / "into").mkdir()
    with pytest.raises(ProtocolError, match="expected a plain file name"):
        target_files(contract, lambda name: b"x", tmp_path / "into")
    assert [*tmp_path.rglob("*")] == [tmp_path / "into"]


def test_identity_holds_what_changes_the_numbers_and_nothing_else() -> None:
    settled, free = TrainConfig(dtype="bfloat16"), frozenset({"loss_chunk"})

    def identity(config: RunConfig, data: str, draft: DFlashConfig = DRAFT) -> Identity:
        return directory.identity(config, draft, free, CONTRACT, data)

    plain = RunConfig(method="dflash", train=settled)
    base = identity(plain, "d1")
    assert base.target == CONTRACT.fingerprint
    elsewhere = RunConfig(
        method="dflash",
        output="elsewhere",
        data=DataConfig(path="moved.jsonl", cache_dir="c"),
        train=msgspec.structs.replace(settled, keep=9, save_every=1, threads=3, log_every=4, device="cpu"),
    )
    assert identity(elsewhere, "d1", DFlashConfig(loss_chunk=7)) == base
    assert identity(plain, "d2") != base
    held = msgspec.structs.replace(plain, validation=ValidationConfig(share=0.02))
    seldom = msgspec.structs.replace(plain, validation=ValidationConfig(share=0.02, every=9, patience=2))
    assert identity(seldom, "d1") == identity(held, "d1") != base
    none = msgspec.structs.replace(plain, validation=ValidationConfig(share=0.0, rows=7))
    assert identity(none, "d1") == base, "as of a run from before rows were held out"
    assert identity(plain, "d1", DFlashConfig(num_layers=1)) != base
    for change in (
        {"method": "other"},
        {"train": msgspec.structs.replace(settled, seed=1)},
        {"train": msgspec.structs.replace(settled, lr=1e-5)},
        {"train": msgspec.structs.replace(settled, dtype="float32")},
        {"data": DataConfig(max_length=99)},
        {"capture": StatesConfig(dtype="float8_e4m3fn")},
    ):
        assert identity(msgspec.structs.replace(plain, **change), "d1") != base


def test_machine_facts_name_no_host() -> None:
    facts = directory.machine_facts()
    assert {"processor", "memory", "GPU", "torch"} <= facts.keys()
    assert "cores usable" in facts["processor"]
