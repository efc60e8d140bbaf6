"""`specd status` obeys nothing that a trainer or a daemon says of itself; status, stop and start refuse in one line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import msgspec
import pytest

from daemons import CONTRACT, REPORT
from samples import batch
from specd.cli import status
from specd.cli.main import run
from specd.client import ask
from specd.client.ask import LONGEST_S, ask_status, dial
from specd.client.subscriber import Subscriber
from specd.config.settings import DaemonConfig, RingConfig, SubscriberConfig, TargetConfig
from specd.daemon.serve import embedded
from specd.errors import ConfigError
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import ReplayInfo
from specd.protocol.messages import Status, StatusReport, decode_reply, encode

HOSTILE = "x[/y] [bold]:smile:\x1b]0;owned\x07\x9b2J\u202e\r\n"
SHOWN = "x[/y] [bold]:smile:�]0;owned��2J���"


@pytest.fixture(scope="module")
def report() -> StatusReport:
    """What a daemon says while a trainer of a hostile name trains from it."""
    target = TargetConfig(model="synthetic:hidden=16,layers=6,vocab=128")
    settings = DaemonConfig(target=target, ring=RingConfig(slots=4, max_sessions=2, slot_tokens=64))
    spec = CaptureSpec(taps=(1,), dtype="float32")
    with embedded(settings) as host:
        config = SubscriberConfig(endpoints=(host.endpoint,), timeout_s=20, connect_s=20)
        with (
            Subscriber(config, spec, context=host.context, name=HOSTILE) as subscriber,
            dial(host.context, host.endpoint) as socket,
        ):
            next(subscriber.stream([batch(0)]))
            socket.send(encode(Status()))
            assert socket.poll(10_000)
            answer = decode_reply(socket.recv())
    assert isinstance(answer, StatusReport)
    return answer


def show(
    report: StatusReport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> str:
    monkeypatch.setenv("COLUMNS", "280")
    monkeypatch.setattr(ask, "ask_status", lambda endpoint, timeout_s, identity: report)
    assert run(["status", *options]) == 0
    return capsys.readouterr().out


def test_a_trainers_name_is_shown_and_not_obeyed(
    report: StatusReport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (trainer,) = report.sessions
    assert trainer.name == SHOWN, "the daemon's log has it too"
    assert f"{SHOWN} {trainer.session[:8]}" in show(report, monkeypatch, capsys)


def test_nothing_a_daemon_says_is_obeyed(
    report: StatusReport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.contract is not None
    trainer = msgspec.structs.replace(report.sessions[0], name=HOSTILE, transport=HOSTILE, gpus=(HOSTILE,), run=HOSTILE)
    told = msgspec.structs.replace(
        report,
        version=HOSTILE,
        contract=msgspec.structs.replace(report.contract, model=HOSTILE, model_type=HOSTILE),
        slots={HOSTILE: 1},
        counters={HOSTILE: 2},
        endpoints=(HOSTILE,),
        transports=(HOSTILE,),
        sessions=(trainer,),
    )
    text = show(told, monkeypatch, capsys)
    assert text.count(SHOWN) == 12  # the model type's is in the fingerprint too, the run's twice, the GPU's is cut
    assert all(letter.isprintable() for letter in text.replace("\n", ""))
    assert show(told, monkeypatch, capsys, "--json").isascii()


def test_a_run_of_several_ranks_is_one_line(
    report: StatusReport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (trainer,) = report.sessions
    ranks = tuple(msgspec.structs.replace(trainer, run="7f3a91c2", ranks=3, batches=number) for number in (700, 800))
    text = show(msgspec.structs.replace(report, sessions=(trainer, *ranks), max_sessions=8), monkeypatch, capsys)
    assert "3 of 8; run 7f3a91c2: 2 of 3 ranks, 1,500 batches" in text
    assert text.count(", run 7f3a91c2") == 2, "each of its sessions says so, the other does not"


def test_what_sharing_saves_is_one_line_and_who_is_behind_is_said(
    report: StatusReport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (trainer,) = report.sessions
    shares = tuple(msgspec.structs.replace(trainer, share="sweep", behind=behind) for behind in (False, True))
    saved = {"fills": 1200, "joins": 890}
    text = show(msgspec.structs.replace(report, sessions=(trainer, *shares), counters=saved), monkeypatch, capsys)
    assert "890 of 2,090 requests needed no forward of their own; sweep: 2 trainers" in text
    assert (text.count(", share sweep"), text.count("share sweep (behind)")) == (2, 1)
    assert "of their own" not in show(report, monkeypatch, capsys)
    lagging = msgspec.structs.replace(
        report, sessions=shares[:1], counters=saved | {"lag_hits": 110, "unlike": 12}, lag_cells=400, lag_used=87
    )
    text = show(lagging, monkeypatch, capsys)
    assert "1,000 of 2,200 requests needed no forward of their own, 110 of them from the lag window; sweep: 1" in text
    assert "87 of 400 batches" in text
    assert "12 batches differ between runs of a share: other data" in text


def test_what_is_kept_over_epochs_is_one_line(
    report: StatusReport, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"replay_hit": 96, "replay_miss": 4, "replay_wrote": 4}
    info = ReplayInfo(cells=9, used=4, cell_bytes=5 << 20)
    text = show(msgspec.structs.replace(report, replay=info, counters=counts), monkeypatch, capsys)
    said = "4 of 9 cells hold a batch, 5 MiB each; 96 of 100 batches replayed (96%), 4 written"
    assert said in " ".join(text.split())
    without = msgspec.structs.replace(report, counters={"fills": 3, "replay_hit": 0, "lag_hits": 0, "replay_wrote": 2})
    text = " ".join(show(without, monkeypatch, capsys).split())
    assert "replayed" not in text
    assert "fills 3, replay_wrote 2" in text, "what it does not have is not counted, unless a worker before had it"


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf"), 2 * LONGEST_S])
def test_a_timeout_that_cannot_be_waited_is_refused_before_anything_is_asked(timeout_s: float, tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"a timeout of \S+ s: expected a number of seconds, 0 to 86,400"):
        ask_status(f"ipc://{tmp_path}/none.sock", timeout_s)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("verb", ["status", "stop"])
@pytest.mark.parametrize("timeout", ["-1", "nan", "inf"])
def test_the_verbs_refuse_it_too(verb: str, timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--timeout", timeout]) == 2
    assert "timeout" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--detach"], ["--endpoint", "tcp://127.0.0.1:*"]])
def test_start_names_the_runtime_directory_it_cannot_write(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.touch()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    assert run(["start", "--model", "synthetic:hidden=8,layers=8", *options]) == 2
    error = capsys.readouterr().err
    assert f"runtime directory '{base}/specd-{os.getuid()}': cannot write there" in error
    assert "set XDG_RUNTIME_DIR" in error
    assert error.count("\n") == 1


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


def test_every_figure_is_whole_at_80_columns(
    daemon: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["status", "--endpoint", daemon]) == 0
    text = capsys.readouterr().out
    trainer = ("trainer-1", "shm, GPU-5e7a", "541,577", "0.77", "1,234", "5 GiB", "2/3", "7.0 s")
    for part in (*trainer, "102.8 batches/s", "0.00 GB/s", "filling 0%", "1 quarantined"):
        assert part in text, part
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
