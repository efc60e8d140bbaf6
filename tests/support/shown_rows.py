"""Rows for the data commands, and what `specd data show` prints of them."""

from __future__ import annotations

import pytest

from chats import talk
from specd.cli.main import run

HELLO = {"messages": talk("Hi", "Hello.")}
ODD = {"messages": [{"role": "robot", "content": "Hi"}]}
"""A row that cannot be used."""


def shown(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert run(["data", "show", *map(str, arguments)]) == code
    return capsys.readouterr().out
