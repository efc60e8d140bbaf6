"""The pipeline benchmark's settings and batches: what can be asked for, what shares a forward, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from specd.bench.pipeline import memory as pipeline_memory
from specd.bench.pipeline.bare_target import grouped
from specd.bench.pipeline.defaults import SMALL, defaults
from specd.bench.pipeline.settings import Settings, SleepConfig, batches
from specd.cli.main import run as command
from specd.errors import ConfigError

TINY = "synthetic:hidden=32,layers=8,vocab=64"
SETTINGS = defaults(True, 1, TINY, {})


def test_batches_never_repeat_tokens_but_keep_their_lengths() -> None:
    one, other = (batches(SETTINGS, "log-normal", 64, 12, nonce) for nonce in (1, 2))
    assert [batch.lengths.tolist() for batch in one] == [batch.lengths.tolist() for batch in other]
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))
    assert len({batch.tokens.tobytes() for batch in one}) == 12
    assert all(batch.num_tokens <= SETTINGS.batch_tokens for batch in one)
    assert len({length for batch in one for length in batch.lengths.tolist()}) > 4
    shifted = batches(SETTINGS, "log-normal", 64, 12, 1, shift=1)
    assert shifted[0].lengths.tolist() == one[1].lengths.tolist()


def test_what_can_share_a_forward_is_what_waits_and_fits() -> None:
    settings = Settings(model=TINY, batch_tokens=3072, forward_tokens=8192)
    assert [settings.merged(depth, "fixed") for depth in (0, 1, 2, 4)] == [1, 1, 2, 2]
    # Log-normal batches seldom fill their budget: three of them may fit where two full ones do.
    assert [settings.merged(depth, "log-normal") for depth in (0, 1, 2, 4)] == [1, 1, 2, 3]
    exact = msgspec.structs.replace(settings, target={"exact": True})
    assert [exact.merged(4, lengths) for lengths in ("fixed", "log-normal")] == [1, 1]
    assert settings.forwards([9000, 4000, 4000, 500, 500], 2) == [slice(0, 1), slice(1, 3), slice(3, 5)]


@pytest.mark.parametrize("steps", [10, 20])
def test_a_bare_target_runs_batches_as_long_as_those_that_rows_time(steps: int) -> None:
    settings = Settings(model=TINY, steps=steps)
    row = batches(settings, "log-normal", 64, settings.warmup + steps, 1)[settings.warmup :]
    alone = batches(settings, "log-normal", 64, steps, 2, settings.warmup)
    assert [batch.lengths.tolist() for batch in alone] == [batch.lengths.tolist() for batch in row]
    for most in (1, 2, 3):
        groups = grouped(settings, alone, most)
        assert max(map(len, groups)) == most
        assert [batch.index for group in groups for batch in group] == [*range(steps)] * most
        for group in groups:
            assert len(group) == 1 or sum(batch.num_tokens for batch in group) <= settings.forward_tokens


def test_what_is_asked_for_stands_beside_the_defaults() -> None:
    settings = defaults(True, 1, TINY, {"draft_config": {"num_layers": 2}})
    assert settings.draft_config == SMALL["draft_config"] | {"num_layers": 2}
    assert defaults(True, 1, TINY, {"target": {"max_forward_tokens": 512}}).forward_tokens == 512


def test_a_draft_that_sleeps_has_options() -> None:
    draft = msgspec.structs.replace(SETTINGS, draft="synthetic:ms=1.5,params=64")
    assert draft.sleep == SleepConfig(ms=1.5, params=64)
    assert SETTINGS.sleep is None


def test_memory_is_that_of_all_devices_of_a_side(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {f"cuda:{index}": 1 << index for index in range(5)}
    monkeypatch.setattr(pipeline_memory, "memory", lambda device: used[device])
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    apart = Settings(model=TINY, target={"tp": 2}, devices=("cuda:0", "cuda:2"), trainer="cuda:4")
    before = pipeline_memory.in_use(apart)
    assert before == used
    used |= {f"cuda:{index}": (1 << index) + 1000 + index for index in range(5)}
    assert pipeline_memory.held(apart, before, ()) == (4006, 1004)
    shared = Settings(model=TINY, devices=("cuda:0", "cuda:1"), trainer="cuda:1")
    assert pipeline_memory.held(shared, before, ()) == (2001 - 300, 300)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "ring.slots=3"], "--set ring: expected target.KEY=VALUE or draft.KEY=VALUE"),
        (["--depths", "two"], "--depths 'two': expected whole numbers"),
        (["--set", "target.tp=abc"], "--set target.tp=abc: expected a whole number of GPUs, at least 1"),
        (["--set", "target.tp=0"], "--set target.tp=0: expected a whole number of GPUs, at least 1"),
        (["--draft", "eagle"], "draft 'eagle': expected dflash or synthetic:ms=MILLISECONDS"),
        (["--draft", "synthetic:ms=1.2.3"], "draft 'synthetic:ms=1.2.3': its options are numbers"),
        (["--draft", "synthetic:ms:20"], "draft 'synthetic:ms:20': expected synthetic:KEY=NUMBER,…"),
        (["--draft", "synthetic:MS=20"], "unknown field `MS`"),
        (["--draft", "synthetic:ms=-5"], "draft 'synthetic:ms=-5': expected ms ≥ 0"),
        (["--transports", "shm,foo"], "--transports foo: expected some of inproc"),
        (["--save", "/tmp"], "--save '/tmp': it is a directory; name a file in it"),
        (["--save", f"/tmp/{'x' * 255}"], "it cannot be written (File name too long)"),
        (["--save", "/nowhere/x.json"], "--save '/nowhere/x.json': its directory does not exist"),
        (["--chart", "x.gif"], "expected a file that ends in .png or .html"),
        (["--daemons", "0"], "--daemons 0"),
        (["--lengths", "uniform"], "uniform"),
        (["--sample-tokens", "999"], "samples of 999 tokens do not fit batches of 256"),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    options: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specd.bench.pipeline.run.daemon", lambda *_: pytest.fail("a daemon was started"))
    assert command(["bench", "pipeline", "--quick", "--model", TINY, *options]) == 2
    assert message in capsys.readouterr().err


def test_unknown_draft_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_anchor"):
        _ = msgspec.structs.replace(SETTINGS, draft_config={"num_anchor": 3}).dflash


def test_a_result_that_cannot_be_kept_does_not_end_the_run(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept.json"

    def run(settings: Settings, progress: Any, keep: Any) -> Any:
        kept.mkdir()
        keep(settings)
        kept.rmdir()
        keep(settings)
        return settings

    monkeypatch.setattr("specd.bench.pipeline.run.run", run)
    options = ["--quick", "--model", TINY, "--save", str(kept), "--json"]
    assert command(["bench", "pipeline", *options]) == 0
    said = capsys.readouterr()
    assert f"--save {kept}: not written this time: Is a directory" in said.err
    assert msgspec.json.decode(kept.read_bytes()) == msgspec.json.decode(said.out)
