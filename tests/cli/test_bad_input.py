"""A user's mistake ends in one clear line that names value, expectation and remedy, and an exit code; no traceback."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specd.cli.main import run
from tiny import TARGET, TINY


def specd(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of one command; what would be a traceback is raised."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = run(["--quiet", *arguments])
    said = stderr.getvalue()
    assert "Traceback" not in said, said
    return code, said


def train(output: Path, *arguments: str, **settings: object) -> tuple[int, str]:
    merged = TINY | {key.replace("__", "."): value for key, value in settings.items()}
    pairs = [part for key, value in merged.items() for part in ("--set", f"{key}={value}")]
    return specd("train", "dflash", "--device", "cpu", "--output", str(output), *pairs, *arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    rows = [{"input_ids": [(i * j) % 250 for j in range(1, 30)], "loss_mask": [1] * 29} for i in range(1, 13)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A daemon whose slots hold 32 tokens."""
    directory = tmp_path_factory.mktemp("d")
    directory.chmod(0o700)
    where = f"ipc://{directory}/d.sock"
    command = [sys.executable, "-m", "specd", "--quiet", "start", "--model", TARGET, "--endpoint", where]
    command += ["--slot-tokens", "32", "--set", "capture.num_taps=2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as daemon:
        try:
            assert daemon.stdout is not None
            assert b"ready" in daemon.stdout.readline()
            yield where
        finally:
            daemon.terminate()
    assert daemon.returncode == 0


def test_unknown_config_key() -> None:
    code, said = specd("start", "--model", TARGET, "--set", "ring.slotz=3")
    assert code == 2
    assert "unknown field `slotz`" in said


def test_a_ring_that_does_not_fit_shared_memory(capfd: pytest.CaptureFixture[str]) -> None:
    code, said = specd("start", "--model", TARGET, "--slots", "4096", "--slot-tokens", "1000000")
    assert code == 1
    assert "shm is not served: the ring needs" in capfd.readouterr().err, "by the worker, a process of its own"
    assert "4096 slots of 640000000 bytes: Cannot allocate memory; configure fewer or shorter slots" in said


def test_an_endpoint_that_is_taken(endpoint: str) -> None:
    code, said = specd("start", "--model", TARGET, "--endpoint", endpoint)
    assert code == 1
    assert f"a daemon already owns {endpoint}" in said


def test_an_endpoint_with_a_path_that_is_too_long(tmp_path: Path) -> None:
    where = f"ipc:///{tmp_path}/{'x' * 95}.sock"
    code, said = specd("start", "--model", TARGET, "--endpoint", where)
    assert code == 2
    assert "shorter" in said or "at most 107" in said


def test_a_tcp_endpoint_that_strangers_can_reach() -> None:
    code, said = specd("start", "--model", TARGET, "--endpoint", "tcp://0.0.0.0:7070")
    assert code == 2
    assert "--key NAME" in said
    code, said = specd("start", "--model", TARGET, "--endpoint", "tcp://192.0.2.7:7070")
    assert code == 2
    assert "expected a key" in said
    assert "--insecure" in said


def test_unreadable_data_and_the_corrected_command(endpoint: str, data: Path, tmp_path: Path) -> None:
    """What went wrong before the first step leaves the output free: --resume has nothing to go on with, and begins."""
    output = tmp_path / "run"
    command = ["--endpoint", endpoint, "--set", "data.batch_tokens=32", "--set", "data.max_length=30"]
    code, said = train(output, *command, "--data", "/nowhere/chats.jsonl")
    assert code != 0
    assert "/nowhere/chats.jsonl" in said
    code, said = train(output, *command, "--data", str(data), draft__mask_token_id=256)
    assert code == 2
    assert "draft.mask_token_id=256" in said
    assert not output.exists()
    assert train(output, *command, "--data", str(data), "--resume") == (0, "")


def test_numbers_out_of_their_range(data: Path, tmp_path: Path) -> None:
    code, said = train(tmp_path / "run", "--model", TARGET, "--data", str(data), draft__num_anchors=0)
    assert code == 2
    assert "Expected `int` >= 1, got 0 - at `$.draft.num_anchors`" in said
    assert not (tmp_path / "run").exists(), "nothing is begun"


def test_flex_attention_without_a_gpu(data: Path, tmp_path: Path) -> None:
    code, said = train(tmp_path / "run", "--model", TARGET, "--data", str(data), draft__attention="flex")
    assert code == 2
    assert "draft.attention=flex on cpu" in said
    assert "auto or sdpa" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("key", ["train.device", "target.device"])
def test_a_gpu_that_is_not_here(key: str, data: Path, tmp_path: Path) -> None:
    code, said = train(tmp_path / "run", "--model", TARGET, "--data", str(data), "--set", f"{key}=cuda")
    assert code == 2
    assert "torch sees no CUDA device here; use auto or cpu" in said
    code, said = train(tmp_path / "run", "--model", TARGET, "--data", str(data), "--set", f"{key}=cuda:7")
    assert code == 2 if key == "train.device" else 1
    assert "use auto, cpu or cuda:N" in said


def test_unknown_transport(endpoint: str, data: Path, tmp_path: Path) -> None:
    code, said = train(tmp_path / "run", "--endpoint", endpoint, "--data", str(data), "--transport", "pigeon")
    assert code == 2
    assert "'pigeon'" in said
    assert "shm, bytes" in said


def test_a_batch_longer_than_a_slot(endpoint: str, data: Path, tmp_path: Path) -> None:
    for further in ([], ["--dry-run"]):
        code, said = train(tmp_path / "run", "--endpoint", endpoint, "--data", str(data), *further)
        assert code == 2
        assert "start the daemon with --set ring.slot_tokens=" in said
        assert "or train with a smaller data.batch_tokens" in said
    assert not (tmp_path / "run").exists(), "nothing is begun"


def test_a_dry_run_knows_of_a_target_what_its_daemon_says(
    endpoint: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(data), "--dry-run"]
    assert train(tmp_path / "run", "--endpoint", endpoint, *arguments, draft__num_taps=1) == (0, "")
    assert "dflash draft for synthetic in " in (said := capsys.readouterr().out)
    assert "6 over 6 batches in 1 epochs" in said
    code, said = train(tmp_path / "run", "--endpoint", endpoint, *arguments, "--share", "s", draft__num_taps=1)
    assert code == 2, "58 tokens of one layer fit a slot for 32 of two, unless another run may want the other"
    assert "batches of 58 tokens, where a slot has 32: start the daemon with --set ring.slot_tokens=58, or" in said
    code, said = train(tmp_path / "run", "--model", TARGET, *arguments)
    assert code == 2
    assert f"--dry-run of {TARGET}: it is no checkpoint, so what it is shows only once it runs: give --end" in said


def test_no_daemon(data: Path, tmp_path: Path) -> None:
    where = f"ipc://{tmp_path}/none.sock"
    code, said = train(tmp_path / "run", "--endpoint", where, "--data", str(data), subscriber__connect_s=1)
    assert code == 1
    assert where in said
    assert "specd start" in said


def test_resume_against_another_target(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train(output, "--model", TARGET, "--data", str(data))[0] == 0
    code, said = train(output, "--model", f"{TARGET},seed=7", "--data", str(data), "--resume")
    assert code == 1
    assert "synthetic-0" in said
    assert "synthetic-7" in said


def test_an_output_that_exists(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, said = train(tmp_path / "run", "--model", TARGET, "--data", str(data))
    assert code == 2
    assert "choose another --output" in said
