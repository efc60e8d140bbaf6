"""Drafts of a run: found wherever they are, taken away whole, and saying how they came to be."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from drafts import make_draft
from specd.errors import CheckpointError, ConfigError
from specd.evaluate.results import EVALS, EvalFacts, Evaluation, PromptResult
from specd.train.checkpoint import STATE
from specd.train.directory import RunFacts, write_facts
from specd.train.export import PROVENANCE, describe, export, find, measured, run_facts, sign

CONFIG = {
    "method": "dflash", "output": "runs/x", "draft": {"init": "", "loss": "dpace"}, "train": {"seed": 3},
    "target": {"model": "tiny"}, "data": {"path": "/secret/rows.jsonl", "cache_dir": "/secret", "date": "2026-01-31"},
    "subscriber": {"endpoints": ["tcp://gpu:1"]}, "capture": {"dtype": "float8_e4m3fn"},
}  # fmt: skip
FACTS = RunFacts(
    started="then",
    target={"model": "tiny", "revision": "c0ffee", "fingerprint": "f" * 9},
    draft={"method": "DFlash"},
    data={"path": "/secret/rows.jsonl", "samples": "9", "digest": "abc", "cannot be used: x": "1, the first: /secret"},
    transports={"ipc:///run/x": "shm"},
    machine={"processor": "fast", "specd": "0.2", "torch": "2.13", "GPU": "none"},
    config=CONFIG,
    directory="/secret",
)
STATE_JSON = (
    b'{"format": 1, "position": {"step": 2}, "identity": {"target": "t", "settings": {}}, "python_rng": 0, '
    b'"numpy_rng": 0, "files": {}}'
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was interrupted at step 2 of 5, with one checkpoint."""
    run = tmp_path / "run"
    run.mkdir()
    write_facts(run, FACTS)
    checkpoint(run, 2)
    return run


def checkpoint(run: Path, step: int) -> Path:
    directory = run / "checkpoints" / f"step-{step:08d}"
    make_draft().export(directory / "draft", {"tokenizer.json": b"{}", "additional_chat_templates/a.jinja": b"a"})
    sign(directory / "draft", FACTS, step, 5)
    (directory / STATE).write_bytes(STATE_JSON)
    return directory


def evaluated(length: float) -> bytes:
    row = PromptResult(
        prompt_tokens=3, new_tokens=4, forwards=2, acceptance_length=length, identical=True, seconds=1, greedy_seconds=1
    )
    result = Evaluation(
        acceptance_length=length, acceptance_by_offset=(0.5,), identical=True, mismatches=(), new_tokens=4, forwards=2,
        tokens_per_s=1, greedy_tokens_per_s=1, prompts=(row,),
    )  # fmt: skip
    facts = EvalFacts(model="tiny", draft="d", untrained=False, block_size=4, max_new_tokens=8, result=result)
    return msgspec.json.encode(facts)


def test_of_a_run_the_newest_draft_is_taken(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = run / "checkpoints" / "step-00000002", checkpoint(run, 4)
    for path in (run, second, second / "draft"):
        found = find(path)
        assert (found.directory, found.checkpoint, found.home) == (second / "draft", second, second)
        assert found.facts is not None
        assert (found.facts.step, found.facts.steps) == (4, 5)
    assert find(first).home == first
    (second / STATE).unlink()  # torn
    assert find(run).checkpoint == first
    make_draft().export(run / "draft")
    sign(run / "draft", FACTS, 5, 5)
    for path in (run, run / "draft"):
        found = find(path)
        assert (found.directory, found.checkpoint, found.home) == (run / "draft", None, run)
    monkeypatch.chdir(run / "draft")
    assert find(Path()).home == run


def test_a_draft_is_known_wherever_it_is_taken_and_gives_no_path_away(run: Path, tmp_path: Path) -> None:
    export(find(run), tmp_path / "away" / "mine")
    found = find(tmp_path / "away" / "mine")
    facts = run_facts(found)
    assert facts is not None
    assert (facts.target, facts.config["train"], facts.config["data"]) == (
        FACTS.target, {"seed": 3}, {"date": "2026-01-31"},
    )  # fmt: skip
    assert found.home == found.directory
    for file in found.directory.iterdir():
        if file.is_file():
            assert b"secret" not in file.read_bytes(), file.name
    assert b"tcp://" not in (found.directory / PROVENANCE).read_bytes()


def test_the_readme_says_how_it_was_trained_and_what_was_measured(run: Path, tmp_path: Path) -> None:
    export(find(run), tmp_path / "before")
    text = (tmp_path / "before" / "README.md").read_text()
    for part in (
        "--speculative-algorithm DFLASH",
        "| steps | 2 of 5 planned",
        "| digest of the data | abc |",
        "| revision of the target | c0ffee |",
        "| states | rounded to float8_e4m3fn on their way",
        "| loss | dpace |",
        "not mea",
    ):
        assert part in text
    (run / "checkpoints" / "step-00000002" / EVALS["trained"]).write_bytes(evaluated(1.75))
    found = find(run)
    assert measured(found) is not None
    export(found, tmp_path / "after")
    text = (tmp_path / "after" / "README.md").read_text()
    assert "| acceptance length | **1.75** on 1 prompts" in text
    assert text.count("## Training") == 1
    assert found.facts is not None
    (tmp_path / "after" / "README.md").unlink()
    describe(tmp_path / "after", found.facts, None)
    assert (tmp_path / "after" / "README.md").read_text().startswith("## Training")


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_who_may_read_an_export_is_up_to_the_umask(run: Path, tmp_path: Path, mask: int) -> None:
    found = find(run)
    (found.directory / "model.safetensors").chmod(0o600)
    before = os.umask(mask)
    try:
        export(found, tmp_path / "out")
    finally:
        os.umask(before)
    places = [tmp_path / "out", *(tmp_path / "out").rglob("*")]
    assert len(places) > 6
    assert {path.stat().st_mode & 0o777 for path in places} == {0o777 & ~mask, 0o666 & ~mask}


def test_what_cannot_be_exported_says_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run' exists: choose another --to"):
        export(find(run), run)
    with pytest.raises(CheckpointError, match="is no draft directory"):
        find(tmp_path)
    newest = run / "checkpoints" / "step-00000002"
    (newest / "draft" / PROVENANCE).write_text("{")
    with pytest.raises(CheckpointError, match="or remove it, and the draft says nothing of its making"):
        find(run)
    (newest / "draft" / PROVENANCE).unlink()
    assert find(run).facts is None
    (newest / "draft" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no draft, as those of specd 0\.1\.0: go on with `specd resume"):
        find(run)
    (newest / STATE).unlink()
    with pytest.raises(CheckpointError, match=r"has no draft yet, .* `specd resume .*run`"):
        find(run)
