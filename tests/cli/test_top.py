"""`specd top`: every figure at 80 columns and in a pipe, several daemons in one view, and nothing said is obeyed."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from daemons import REPORT, answering
from specd.cli.main import run

HOSTILE = "x[/y] [bold]:smile:\x1b]0;owned\x07\u202e" + "n" * 60
BUSY = msgspec.structs.replace(
    REPORT,
    counters={
        "tokens": 12_000_000,
        "batches": 24_000,
        "bytes": 12 << 30,
        "failed": 3,
        "fills": 1200,
        "joins": 800,
        "filling_us": 9,
        "no_request_us": 1,
    },
    uptime_s=10.0,
    sessions=tuple(
        msgspec.structs.replace(REPORT.sessions[0], session=f"{n}" * 16, name=name, tokens=8_641_975, batches=86_420)
        for n, name in enumerate(("trainer-1", HOSTILE))
    ),
)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.usefixtures("narrow")
def test_every_figure_is_whole_at_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint = f"ipc://{tmp_path}/d.sock"
    with answering(endpoint, BUSY):
        assert run(["top", "--once", "--every", "0.2", "--timeout", "20", "-e", endpoint]) == 0
    text = capsys.readouterr().out
    for part in ("tiny", "serving", "3/8 busy", "2 ready, 1 quarantined", "1 waiting", "3 failed batches", "2/3"):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert all(letter.isprintable() for letter in text.replace("\n", ""))


@pytest.mark.usefixtures("narrow")
def test_the_first_look_shows_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from specd.cli.top import page
    from specd.client.watch import Reading

    Console(markup=False).print(page(Reading("ipc:///d.sock", BUSY), None))
    text = capsys.readouterr().out
    for part in (
        "1,200,000 tokens/s",
        "2,400.0 batches/s",
        "1.29 GB/s",
        "filling 90%",
        "800 of 2,000 requests needed no forward of their own",
        "1,234,568",
        "86,420",
        "0.77",
    ):
        assert part in text, part


def test_one_daemon_that_is_gone_is_shown_beside_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there, gone = f"ipc://{tmp_path}/d.sock", f"ipc://{tmp_path}/none.sock"
    with answering(there, REPORT):
        assert run(["top", "--once", "--every", "0.2", "--timeout", "20", "-e", gone, "-e", there]) == 1
    text = capsys.readouterr().out
    assert "no daemon answers" in text
    assert "trainer-1" in text


def test_a_key_is_asked_for_with_a_servers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["top", "-e", "tcp://127.0.0.1:9", "--server-key", "x"]) == 2
    assert "--server-key is given without --key" in capsys.readouterr().err
