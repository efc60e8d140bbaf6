"""What a run leaves to specd is chosen once: a date and a mask token that a resumed run keeps."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from msgspec.structs import replace

from chats import CHATML, talk, write_rows, write_target
from specd.config.settings import (
    Config,
    DaemonConfig,
    DataConfig,
    RingConfig,
    RunConfig,
    TargetConfig,
    ValidationConfig,
)
from specd.daemon.serve import Embedded, embedded
from specd.data.faults import Fault
from specd.data.portion import Report
from specd.drafts.dflash.settings import DFlashConfig
from specd.errors import CheckpointError, ConfigError
from specd.protocol.contract import ReplayInfo
from specd.train.preparation import data_facts, kept, mask_of, prepared, warn_of_length, warn_of_packing
from specd.train.trainer import TrainedRun, train_draft

DRAFT = {"num_layers": 1, "num_taps": 2, "block_size": 4, "num_anchors": 4}
DATED = CHATML.replace("Be brief.", "Today is ' + strftime_now('%d %B %Y') + '.")
PADDED = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose template asks for the date, and whose embedding has rows that the tokenizer has no tokens for."""
    return write_target(tmp_path_factory.mktemp("target") / "dated", 6, template=DATED, padded=PADDED)


@pytest.fixture(scope="module")
def host(model: Path) -> Iterator[Embedded]:
    target = TargetConfig(model=str(model), device="cpu", threads=1)
    with embedded(DaemonConfig(target=target, ring=RingConfig(slots=6, slot_tokens=256))) as host:
        yield host


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    path = write_rows(tmp_path / "a.jsonl", *({"messages": talk("Hi", f"Hello {i}.")} for i in range(9)))
    return {
        "method": "dflash", "output": str(tmp_path / "run"), "draft": DRAFT,
        "train": {"max_steps": 2, "device": "cpu", "save_every": 1},
        "data": {"path": path, "cache_dir": str(tmp_path / "cache"), "max_length": 200, "batch_tokens": 200},
    }  # fmt: skip


def config_of(done: TrainedRun) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((done.directory / "run.json").read_bytes())["config"]
    return found


def unfinished(done: TrainedRun) -> None:
    """As if it had been killed before its draft was exported."""
    shutil.rmtree(done.draft)


def test_a_run_keeps_its_date_and_its_mask_token(
    host: Embedded,
    settings: dict[str, Any],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    size = json.loads((model / "config.json").read_bytes())["vocab_size"]

    class Monday:
        @staticmethod
        def today() -> Any:
            import datetime

            return datetime.date(2026, 3, 2)

    monkeypatch.setattr("specd.data.dataset.date", Monday)
    with caplog.at_level(logging.INFO):
        done = train_draft(settings, host=host)
    first = config_of(done)
    assert (first["data"]["date"], first["draft"]["mask_token_id"]) == ("2026-03-02", size - PADDED)
    assert f"mask token {size - PADDED}: the target's embedding has {PADDED} rows more" in caplog.text
    assert caplog.text.count("it is told 2026-03-02") == 1
    monkeypatch.undo()
    assert train_draft(settings, host=host, resume=True).was_finished
    unfinished(done)
    shutil.rmtree(settings["data"]["cache_dir"])
    assert not train_draft(settings, host=host, resume=True).was_finished
    assert config_of(done) == first
    unfinished(done)
    for section, other in (("data", {"date": "2026-03-03"}), ("draft", {"mask_token_id": size - 1})):
        with pytest.raises(CheckpointError, match=f"{section}.{next(iter(other))} was "):
            train_draft(settings | {section: settings[section] | other}, host=host, resume=True)


def test_what_the_settings_say_goes_before_what_the_run_began_with() -> None:
    run = RunConfig(method="dflash", draft={"mask_token_id": 7}, data=DataConfig(date="2026-01-01"))
    now = RunConfig(method="dflash")
    assert kept(now, DFlashConfig(), None) == (now, DFlashConfig())
    config, draft = kept(now, DFlashConfig(), run)
    assert (config.data.date, mask_of(draft)) == ("2026-01-01", 7)
    assert config.validation.share == 0, "a run from before rows were held out holds none out"
    shared = kept(now, DFlashConfig(), replace(run, validation=ValidationConfig(share=0.05)))[0]
    assert shared.validation.share == 0.05
    own = replace(now, data=DataConfig(date="2026-02-02"), validation=ValidationConfig(share=0.1))
    assert kept(own, DFlashConfig(mask_token_id=3), run) == (own, DFlashConfig(mask_token_id=3))


def test_a_draft_without_a_mask_token_is_left_alone(model: Path, settings: dict[str, Any]) -> None:
    class Plain(Config, kw_only=True, frozen=True):
        width: int = 3

    config = RunConfig(method="plain", data=msgspec.convert(settings["data"], DataConfig))
    found = prepared(config, Plain(), model, 10**6, "mine", consecutive_labels=1)
    assert found.draft == Plain()
    assert found.config.draft == {"width": 3}


def test_a_run_that_goes_on_keeps_a_mask_token_that_is_refused_today(model: Path, settings: dict[str, Any]) -> None:
    rows = [{"input_ids": [5, 6, 7], "loss_mask": [1, 1, 1]}]
    data = replace(
        msgspec.convert(settings["data"], DataConfig), path=write_rows(Path(settings["data"]["path"]), *rows)
    )
    config, draft = RunConfig(method="dflash", data=data), DFlashConfig(mask_token_id=6)
    with pytest.raises(ConfigError, match="the data has this token 1 times"):
        prepared(config, draft, model, 10**6, "mine", consecutive_labels=1)
    begun = replace(config, draft={"mask_token_id": 6})
    assert prepared(config, draft, model, 10**6, "mine", consecutive_labels=1, begun=begun).draft == draft


def test_facts_name_what_is_left_out() -> None:
    fault = Fault(kind="unknown role", rows=1200, first="a.jsonl line 3: turn 1 …")

    class Counted:
        report = Report(rows=5000, samples=3795, without_labels=10, split=5, dropped=7, bad=(fault,))
        digest = "d"

    counted: Any = Counted()
    facts = data_facts(("a.jsonl", "b.jsonl"), counted)
    assert facts["path"] == "a.jsonl, b.jsonl"
    assert facts["left out, cannot be used"] == 1200
    assert facts["cannot be used: unknown role"] == "1,200, the first: a.jsonl line 3: turn 1 …"
    assert facts["more samples of split documents"] == 5
    assert list(facts)[-1] == "digest"


@pytest.mark.parametrize(
    ("target", "longest", "says"),
    [
        ({"max_position_embeddings": 2048}, 2048, ""),
        ({"max_position_embeddings": 2048}, 2049, "2049 tokens, and tiny was made for up to 2048"),
        ({"text_config": {"max_position_embeddings": 64}}, 65, "made for up to 64"),
        ({"n_positions": 1024}, 1025, "made for up to 1024"),
        ({}, 1 << 20, ""),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope"},
            },
            8192,
            "turns to other rotary frequencies beyond 4096",
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {"rope_type": "llama3", "original_max_position_embeddings": 8192},
            },
            9000,
            "",
        ),
    ],
)
def test_samples_beyond_what_a_target_was_made_for_are_told_of(
    caplog: pytest.LogCaptureFixture, target: dict[str, Any], longest: int, says: str
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_length(longest, target, "tiny")
    assert [says in record.getMessage() for record in caplog.records] == ([True] if says else [])


class Source(NamedTuple):
    """What is known of daemons."""

    replay: ReplayInfo | None
    stands_by: bool


def test_what_keeps_states_from_coming_back_is_said(caplog: pytest.LogCaptureFixture) -> None:
    keeps = ReplayInfo(cells=9, used=0, cell_bytes=4096)
    anew, fixed = (RunConfig(method="x", data=DataConfig(packing=packing)) for packing in ("anew", "fixed"))
    once = replace(anew, train=replace(anew.train, epochs=1))

    def said(config: RunConfig, replay: ReplayInfo | None, stands_by: bool = False) -> str:
        caplog.clear()
        warn_of_packing(config, Source(replay, stands_by))
        return " ".join(record.message for record in caplog.records)

    assert "data.packing=anew makes every epoch's batches new" in said(anew, keeps)
    assert "--set subscriber.place=all" in said(fixed, keeps, True)
    assert [said(anew, None), said(once, keeps), said(fixed, keeps), said(fixed, None, True)] == [""] * 4
