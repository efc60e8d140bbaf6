"""The command line: help of every verb, one-line errors and exit codes, settings, and a daemon started and stopped."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import typer
import zmq
from typer.testing import CliRunner

import specd
from specd.cli import bench, demo, doctor, main, settings, start, status, stop
from specd.cli.main import app, run
from specd.errors import ConfigError, DaemonError
from specd.protocol.contract import RingInfo, TargetContract
from specd.protocol.messages import SessionStatus, Status, StatusReport, decode, encode
from specd.train.interrupt import Interrupt

VERBS = (
    ["start"],
    ["status"],
    ["stop"],
    ["train", "dflash"],
    ["eval"],
    ["report"],
    ["data", "regenerate"],
    ["data", "show"],
    ["data", "stats"],
    ["doctor"],
    ["bench", "transport"],
    ["bench", "daemon"],
    ["bench", "draft"],
    ["bench", "pipeline"],
    ["plan"],
    ["demo"],
)
CONTRACT = TargetContract(
    model="tiny",
    model_type="llama",
    hidden_size=64,
    num_layers=4,
    vocab_size=512,
    dtype="float32",
    weights="feed",
)
REPORT = StatusReport(
    epoch=bytes(range(16)),
    state="serving",
    version=specd.__version__,
    pid=os.getpid(),
    worker_pid=0,
    uptime_s=12.0,
    contract=CONTRACT,
    ring=RingInfo(num_slots=8, slot_bytes=5 << 20, slot_tokens=4096),
    slots={"free": 5, "filling": 0, "ready": 2, "quarantined": 1},
    queued=1,
    sessions=(
        SessionStatus(
            session="ab" * 16,
            name="trainer-1",
            transport="shm",
            gpus=("GPU-5e7a1c90-0000",),
            credits=3,
            outstanding=2,
            leases=1,
            batches=1234,
            nbytes=5 << 30,
            age_s=7.0,
        ),
    ),
    counters={"batches": 1234},
    endpoints=("ipc:///tmp/x/daemon.sock",),
    transports=("shm", "bytes"),
)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@contextlib.contextmanager
def answering(endpoint: str, report: StatusReport) -> Iterator[None]:
    """A two-line daemon that answers every question with `report`."""
    stop = threading.Event()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(endpoint)

        def answer() -> None:
            while not stop.is_set():
                if socket.poll(50):
                    key, frame = socket.recv_multipart()
                    assert isinstance(decode(frame), Status)
                    socket.send_multipart([key, encode(report)])

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[str]:
    """Endpoint of a daemon that answers with REPORT."""
    endpoint = f"ipc://{tmp_path}/d.sock"
    with answering(endpoint, REPORT):
        yield endpoint


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Endpoint and process of a daemon that heeds no signal but SIGKILL."""
    code = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print(flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        endpoint = f"ipc://{tmp_path}/d.sock"
        with answering(endpoint, msgspec.structs.replace(REPORT, pid=process.pid)):
            yield endpoint, process
        process.kill()


def specd_command(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run `specd …` as a process of its own."""
    command = [sys.executable, "-m", "specd", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_is_complete_and_has_an_example(verb: list[str]) -> None:
    result = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    assert f"specd {' '.join(verb)}" in result.output
    assert re.search(r"[Ee]xamples?:", result.output)
    command = typer.main.get_command(app)
    for part in verb:
        command = command.commands[part]  # type: ignore[attr-defined]
    undocumented = [option.name for option in command.params if not getattr(option, "help", "") and not option.hidden]  # type: ignore[attr-defined]
    assert undocumented == []


def test_help_groups_the_verbs() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    assert [text.index(panel) for panel in ("Serve", "Train", "Data", "Look")] == sorted(
        text.index(panel) for panel in ("Serve", "Train", "Data", "Look")
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"specd {specd.__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"), [(DaemonError("no daemon"), 1), (ConfigError("no such key"), 2), (KeyboardInterrupt(), 130)]
)
def test_errors_leave_as_one_line_and_a_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "machine", fail)
    assert run(["doctor"]) == code
    expected = "" if isinstance(error, KeyboardInterrupt) else f"specd: error: {error}\n"
    assert capsys.readouterr().err == expected


def test_wrong_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--endpiont", "x"]) == 2
    assert "--endpiont" in capsys.readouterr().err


def test_logging_is_set_up_once() -> None:
    for _ in range(3):
        main.log_to_stderr(logging.DEBUG)
    logger = logging.getLogger("specd")
    assert (len(logger.handlers), logger.level, os.environ["SPECD_LOG"]) == (1, logging.DEBUG, "DEBUG")


def test_flags_win_over_the_file_and_settings_over_flags() -> None:
    file = {"target": {"model": "smollm2-135m", "dtype": "float16"}, "ring": {"slots": 3, "slot_tokens": 77}}
    flags = settings.given({"target": {"dtype": "bfloat16", "device": ""}, "ring": {"slots": 5}, "transports": []})
    config = settings.daemon_config(file, flags, ["ring.slots=6", "target.threads=2"])
    assert config.target.model == "smollm2-135m"
    assert (config.target.dtype, config.target.threads, config.target.device) == ("bfloat16", 2, "auto")
    assert (config.ring.slots, config.ring.slot_tokens) == (6, 77)
    assert config.transports == ("auto",)


def test_given_keeps_false_and_zero() -> None:
    assert settings.given({"a": False, "b": 0, "c": None, "d": "", "e": {"f": []}}) == {"a": False, "b": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no target given"),
        (["--model", "smollm2-135m", "--set", "ring.slot=4"], "unknown field `slot`"),
        (["--model", "smollm2-135m", "--backend", "gguf"], "gguf"),
        (["--model", "smollm2-135m", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_start_refuses_wrong_settings(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["start", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_ready_line_says_where_what_and_how_much() -> None:
    line = start.ready_line(REPORT)
    assert "\n" not in line
    for part in ("ipc:///tmp/x/daemon.sock", "tiny", "8 slots", "41,943,040 bytes", "40 MiB"):
        assert part in line


def test_resident_bytes_ignores_the_dead() -> None:
    own = start.resident_bytes({os.getpid()})
    assert own > 1 << 20
    assert start.resident_bytes({1 << 30}) == 0


def test_status_shows_the_daemon(daemon: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--endpoint", daemon]) == 0
    text = capsys.readouterr().out
    for part in (
        "serving",
        "tiny",
        CONTRACT.fingerprint,
        "1 quarantined",
        "GPU-5e7a1c90",
        "trainer-1",
        "1,234",
        "5 GiB",
    ):
        assert part in text


def test_status_as_json(daemon: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--endpoint", daemon, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(status.as_data(REPORT)))


@pytest.mark.parametrize("verb", ["status", "stop"])
def test_no_daemon_is_one_clear_line(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = f"ipc://{tmp_path}/none.sock"
    assert run([verb, "--endpoint", endpoint, "--timeout", "0.2"]) == 1
    error = capsys.readouterr().err
    assert endpoint in error
    assert "specd start" in error
    assert error.count("\n") == 1


def test_stop_gives_up_on_a_daemon_that_stays(
    stubborn: tuple[str, subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint, process = stubborn
    assert run(["stop", "--endpoint", endpoint, "--timeout", "0.3"]) == 1
    assert "--force" in capsys.readouterr().err
    assert process.poll() is None


def test_force_ends_a_daemon_that_stays(
    stubborn: tuple[str, subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, process = stubborn
    monkeypatch.setattr(stop, "GRACE_S", 0.2)
    assert run(["stop", "--endpoint", endpoint, "--timeout", "0.3", "--force"]) == 0
    assert process.wait() == -signal.SIGKILL


def test_stop_never_signals_what_may_be_another_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as probe:
        port = probe.bind_to_random_port("tcp://127.0.0.1")
    with answering(f"tcp://127.0.0.1:{port}", REPORT):
        assert run(["stop", "--endpoint", f"tcp://127.0.0.1:{port}"]) == 1
    assert f"process {os.getpid()}" in capsys.readouterr().err


def test_doctor_finds_what_works_here() -> None:
    result = specd_command("doctor", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    found = {(entry["kind"], entry["name"]): entry["works"] for entry in json.loads(result.stdout)["findings"]}
    assert found["transport", "inproc"]
    assert found["transport", "bytes"]
    assert found["backend", "synthetic"]
    assert ("preset", "smollm2-135m") in found


def test_doctor_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(specd.transports.registry.BUILTIN, "gone", "specd.transports.gone:Gone")
    finding = doctor.check_transport("gone")
    assert not finding.works
    assert "cannot be imported" in finding.note


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """An endpoint whose daemon, if a test leaves one, is ended."""
    place = tmp_path / "run"
    place.mkdir(mode=0o700)
    name = f"ipc://{place}/d.sock"
    yield name
    specd_command("stop", "--endpoint", name, "--timeout", "0.5", "--force")


def synthetic(endpoint: str) -> list[str]:
    """Arguments that start a small detached daemon without a model."""
    shape = ["--model", "synthetic:hidden=8,layers=8", "--slots", "4", "--slot-tokens", "64"]
    return ["start", *shape, "--endpoint", endpoint, "--detach"]


def test_a_daemon_is_started_asked_and_stopped(endpoint: str) -> None:
    begun = specd_command(*synthetic(endpoint))
    assert begun.returncode == 0, begun.stderr
    assert begun.stdout.count("\n") == 1
    assert f"specd ready at {endpoint}" in begun.stdout
    report = json.loads(specd_command("status", "--endpoint", endpoint, "--json").stdout)
    assert report["state"] == "serving"
    assert report["ring"]["num_slots"] == 4
    refused = specd_command(*synthetic(endpoint))
    assert refused.returncode == 1
    assert re.fullmatch(r"specd: error: a daemon already owns .*\n", refused.stderr.splitlines(keepends=True)[-1])
    ended = specd_command("stop", "--endpoint", endpoint)
    assert ended.returncode == 0, ended.stderr
    assert specd_command("status", "--endpoint", endpoint, "--timeout", "0.2").returncode == 1


def test_detached_failure_reaches_the_terminal(endpoint: str) -> None:
    result = specd_command(*synthetic(endpoint), "--set", "target.model=/no/such/directory")
    assert result.returncode != 0
    assert "/no/such/directory" in result.stderr
    assert "Traceback" not in result.stderr


def test_demo_leaves_no_daemon_behind_when_it_is_interrupted(endpoint: str, tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is ignored

    def interrupted() -> None:
        with Interrupt() as interrupt, demo.Stage(interrupt) as stage:
            stage.serve(tmp_path / "log", *(argument for argument in synthetic(endpoint) if argument != "--detach"))
            assert specd_command("status", "--endpoint", endpoint).returncode == 0
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert specd_command("status", "--endpoint", endpoint, "--timeout", "0.2").returncode == 1


def test_demo_replaces_no_directory_that_holds_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "run" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert run(["demo", "--quick", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"specd: error: \S+ exists and holds no run \(run\.json\).*\n", error)
    assert kept.exists()


def test_demo_makes_room_where_an_earlier_run_lies(tmp_path: Path) -> None:
    earlier = tmp_path / "run"
    earlier.mkdir()
    demo.remove_run(earlier)  # it was cut short before it began: nothing is in the way
    for name in ("run.json", "draft.json"):
        (earlier / name).write_text("{}")
    demo.remove_run(earlier)
    assert not earlier.exists()


def test_demo_ends_with_the_code_of_a_failed_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end, demo.Stage(Interrupt()) as stage:
        stage.run("start", "--model", "smollm2-135m", "--set", "nonsense=1")
    assert end.value.exit_code == 2
    assert "nonsense" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5M", "0", "3T", "M"])
def test_bench_refuses_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="64M"):
        bench._bytes(text)


def test_bench_sizes() -> None:
    assert [bench._bytes(text) for text in ("17", "4k", "64M", "1G")] == [17, 4096, 64 << 20, 1 << 30]
