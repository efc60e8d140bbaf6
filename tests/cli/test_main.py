"""The command line as a whole: help of every verb, one-line errors and exit codes, logging."""

from __future__ import annotations

import io
import logging
import os
import re
import sys

import pytest
import typer
from typer.testing import CliRunner

import specd
from specd.cli import doctor, furnish
from specd.cli.main import app, run
from specd.errors import ConfigError, DaemonError

VERBS = (
    ["start"],
    ["status"],
    ["stop"],
    ["keys", "new"],
    ["keys", "allow"],
    ["keys", "list"],
    ["keys", "revoke"],
    ["train", "dflash"],
    ["resume"],
    ["eval"],
    ["export"],
    ["push"],
    ["report"],
    ["data", "regenerate"],
    ["data", "show"],
    ["data", "stats"],
    ["config"],
    ["doctor"],
    ["bench", "transport"],
    ["bench", "daemon"],
    ["bench", "draft"],
    ["bench", "pipeline"],
    ["plan"],
    ["demo"],
)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_is_complete_and_has_an_example(verb: list[str]) -> None:
    result = CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    assert f"specd {' '.join(verb)}" in result.output
    assert re.search(r"[Ee]xamples?:", result.output)
    command = typer.main.get_command(app)
    for part in verb:  # the last word of `train dflash` is an argument
        command = getattr(command, "commands", {part: command})[part]
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
    expected = "specd: interrupted\n" if isinstance(error, KeyboardInterrupt) else f"specd: error: {error}\n"
    assert capsys.readouterr().err == expected


def test_wrong_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--endpiont", "x"]) == 2
    assert "--endpiont" in capsys.readouterr().err


def test_logging_is_set_up_once() -> None:
    for _ in range(3):
        furnish.log_to_stderr(logging.DEBUG)
    logger = logging.getLogger("specd")
    assert (len(logger.handlers), logger.level, os.environ["SPECD_LOG"]) == (1, logging.DEBUG, "DEBUG")


def test_logs_go_to_the_standard_error_of_the_moment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a bar has it, which takes lines above itself."""
    furnish.log_to_stderr(logging.INFO)
    with monkeypatch.context() as moment:
        moment.setattr(sys, "stderr", above := io.StringIO())
        logging.getLogger("specd.x").info("while")
    logging.getLogger("specd.x").info("after")
    assert above.getvalue().endswith("INFO specd.x: while\n")
    assert capsys.readouterr().err.endswith("INFO specd.x: after\n")
