"""What every verb has: examples that can be copied, defaults that are shown, logging behind the verb, completion."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from specd import log
from specd.cli import doctor
from specd.cli.furnish import DEFAULTS, examples
from specd.cli.main import app, run
from specd.config.settings import SubscriberConfig
from specd.drafts import registry
from specd.errors import SpecdError


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, each in getattr(command, "commands", {}).items():
        yield from verbs(each, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


VERBS = dict(verbs(typer.main.get_command(app)))


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_examples_are_copied_as_they_stand(path: tuple[str, ...]) -> None:
    text = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}).output
    shown = text.partition(" Examples:\n")[2].splitlines()
    assert max(map(len, shown)) <= 80
    commands = [words for words in map(shlex.split, "\n".join(shown).replace("\\\n", " ").splitlines()) if words]
    assert commands
    known = {option for param in VERBS[path].params for option in (*param.opts, *param.secondary_opts)}
    own = [words for words in commands if tuple(words[1 : 1 + len(path)]) == path]
    assert own, "an example of the verb itself"
    for words in own:
        assert {word for word in words if word.startswith("-")} <= known


def test_a_long_example_is_folded_between_options() -> None:
    (line, more) = "\n".join(
        examples("Examples: `specd a --first " + "x" * 40 + " --second 'one two' --third yy`")
    ).split("\n")
    assert line == "  specd a --first " + "x" * 40 + " \\"
    assert more == "      --second 'one two' --third yy"


def test_defaults_are_those_of_the_settings() -> None:
    for verb, (_, options) in DEFAULTS.items():
        assert options.keys() <= {param.name for param in VERBS[(verb,)].params}
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    depth = text[text.index("--depth") :].partition("--")[2].partition("--")[0]
    assert f"[default: ({SubscriberConfig().depth})]" in depth


@pytest.fixture
def own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets is undone."""
    monkeypatch.setenv(log.FORM, "text")


@pytest.mark.usefixtures("own_form")
@pytest.mark.parametrize(
    ("arguments", "level"),
    [
        (["doctor", "-v"], logging.DEBUG),
        (["-v", "doctor"], logging.DEBUG),
        (["-v", "doctor", "-q"], logging.WARNING),
        (["doctor"], logging.INFO),
    ],
)
def test_verbosity_may_stand_behind_the_verb(arguments: list[str], level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise SpecdError("here")

    monkeypatch.setattr(doctor, "machine", fail)
    assert run(arguments) == 1
    assert (logging.getLogger("specd").level, os.environ["SPECD_LOG"]) == (level, logging.getLevelName(level))


@pytest.mark.usefixtures("own_form")
@pytest.mark.parametrize("arguments", [["--log-format", "json", "doctor"], ["doctor", "--log-format", "json"]])
def test_an_error_is_a_line_of_json_too(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        error = SpecdError("no “x”")
        error.add_note("try y")
        raise error

    monkeypatch.setattr(doctor, "machine", fail)
    assert run(arguments) == 1
    said = json.loads(capsys.readouterr().err)
    assert (said["level"], said["message"]) == ("ERROR", "no “x”\ntry y")


@pytest.mark.usefixtures("own_form")
def test_another_form_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--log-format", "xml", "doctor"], ["doctor", "--log-format", "xml"]):
        assert run(arguments) == 2
        assert "--log-format 'xml': expected one of text, json" in capsys.readouterr().err


def test_every_line_of_a_daemon_and_its_worker_is_json(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "specd", "start", "--model", "synthetic:hidden=32,layers=8,vocab=256"]
    command += ["--endpoint", f"ipc://{tmp_path}/d.sock", "--device", "cpu", "-v", "--log-format", "json"]
    with (
        (tmp_path / "log").open("wb") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file) as daemon,
    ):
        assert daemon.stdout is not None
        assert daemon.stdout.readline().startswith(b"specd ready")
        daemon.send_signal(signal.SIGINT)
        daemon.wait(60)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {"specd", "worker"} == {line["process"] for line in lines}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in lines)


@pytest.mark.parametrize(
    ("words", "place", "offered"),
    [
        ("specd re", 1, {"replay", "resume", "report"}),
        ("specd train ", 2, set(registry.BUILTIN)),
        ("specd train dflash --model smol", 4, {"smollm2-135m"}),
        ("specd train dflash --dry", 3, {"--dry-run"}),
    ],
)
def test_the_shell_completes(words: str, place: int, offered: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"_SPECD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(place)}
    text = CliRunner().invoke(app, [], prog_name="specd", env=own).output
    assert set(text.split()) == offered
