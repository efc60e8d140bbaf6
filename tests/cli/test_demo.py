"""`specd demo`: it cleans up, and replaces nothing but runs."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from daemons import specd_command, synthetic
from specd.cli import demo
from specd.cli.main import run
from specd.client.ask import ask_status
from specd.config.presets import preset
from specd.drafts import registry
from specd.train.interrupt import Interrupt
from specd.train.owner import owned
from step_records import make_run


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


def test_demo_says_how_a_shell_finds_specd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "my env" / "bin"
    programs.mkdir(parents=True)
    for name in ("activate", "specd"):
        (programs / name).touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(programs.parent))
    assert demo.activation() == [". 'my env/bin/activate'"]
    monkeypatch.setenv("PATH", str(programs))
    assert demo.activation() == []
    (programs / "activate").unlink()
    monkeypatch.setenv("PATH", "")
    assert demo.activation() == [], "an environment of another kind"


def test_demo_makes_room_where_an_earlier_run_lies(tmp_path: Path) -> None:
    earlier = tmp_path / "run"
    earlier.mkdir()
    demo.remove_run(earlier)  # it was cut short before it began: nothing is in the way
    for name in ("run.json", "draft.json"):
        (earlier / name).write_text("{}")
    (earlier / "checkpoints" / "step-00000005").mkdir(parents=True)
    demo.remove_run(earlier)
    assert [*earlier.iterdir()] == []
    demo.remove_run(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_demo_touches_no_run_in_which_somebody_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alive = make_run(tmp_path / "run", steps=2, evals=False)
    for owner, place in ((alive, "run"), (tmp_path, "")):
        with owned(owner):
            before = sorted(alive.iterdir())
            assert run(["demo", "--quick", "--output", str(tmp_path)]) == 2
            assert (
                f"process {os.getpid()} on {socket.gethostname()} trains in '{tmp_path / place}'"
                in capsys.readouterr().err
            )
            assert sorted(alive.iterdir()) == before


def test_what_a_killed_demo_started_ends_with_it(endpoint: str, tmp_path: Path) -> None:
    """Its daemon, and the daemon's worker."""
    code = (
        "import signal, sys; from pathlib import Path; from specd.cli.demo import Stage\n"
        "from specd.train.interrupt import Interrupt\n"
        "with Interrupt() as interrupt, Stage(interrupt) as stage:\n"
        "    stage.serve(Path(sys.argv[1]), *sys.argv[2:]); print('served', flush=True); signal.pause()"
    )
    arguments = [argument for argument in synthetic(endpoint) if argument != "--detach"]
    command = [sys.executable, "-c", code, str(tmp_path / "log"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line == "served\n" for line in process.stdout), (tmp_path / "log").read_text()
        status = ask_status(endpoint, 30)
        left = [os.pidfd_open(pid) for pid in (status.pid, status.worker_pid)]
        process.kill()
    try:
        for pidfd in left:
            assert select.select([pidfd], [], [], 20)[0], "it outlives the demo"
    finally:
        for pidfd in left:
            os.close(pidfd)


def test_a_child_whose_parent_died_before_it_began_ends_at_once() -> None:
    command = [sys.executable, "-P", "-m", "specd.cli.child", "1", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    command[4] = str(os.getpid())
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.startswith("specd ")


def test_demo_ends_with_the_code_of_a_failed_command(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end, demo.Stage(Interrupt()) as stage:
        stage.run("start", "--model", "smollm2-135m", "--set", "nonsense=1")
    assert end.value.exit_code == 2
    assert "nonsense" in capfd.readouterr().err


def test_demo_refuses_a_draft_that_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--quick", "--method", "pigeon", "--output", str(tmp_path / "out")]) == 2
    assert "unknown draft method 'pigeon'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", registry.BUILTIN)
def test_demo_trains_the_draft_that_is_asked_for(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recipe of its target."""
    ran: list[tuple[str, ...]] = []

    def note(_stage: demo.Stage, *arguments: str) -> None:
        ran.append(arguments)
        if arguments[0] == "train":
            raise typer.Exit(3)

    monkeypatch.setattr(demo.Stage, "run", note)
    monkeypatch.setattr(demo.Stage, "serve", lambda *_: None)
    monkeypatch.setattr("specd.targets.source.resolve", lambda _: SimpleNamespace(path=tmp_path))
    assert run(["demo", "--quick", "--method", method, "--output", str(tmp_path / "out")]) == 3
    assert ran[-1][:2] == ("train", method)
    known = preset(demo.MODEL)
    assert known is not None
    assert method in known.run
