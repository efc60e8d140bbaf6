"""The snippets of docs/use.md run as they stand, in order, as one program; commands of other pages are real ones."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.main import get_command

from chats import write_target
from specd.cli.main import app
from specd.config.load import overrides
from specd.config.settings import DaemonConfig, RunConfig
from streams import hosted

TEXT = Path(__file__).parents[2] / "docs" / "use.md"


def test_the_python_way_works_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a target that loads at once; its name is all that is changed."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", TEXT.read_text(encoding="utf-8"), re.DOTALL))
    target = write_target(tmp_path / "target", num_layers=30)
    monkeypatch.setenv("SPECD_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    code = code.replace('"smollm2-135m"', repr(str(target)))
    # What a preset's recipe would say of this target.
    code = code.replace(
        '"train": {"max_steps": 4}', '"train": {"max_steps": 4}, "draft": {"mask_token_id": 0, "num_anchors": 4}'
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, str(TEXT), "exec"), {"__name__": "use"})
    lines = said.getvalue().splitlines()
    assert lines[:3] == [f"{index} (24, 3, 32)" for index in range(3)]
    assert re.fullmatch(r"4 1\.\d+ 2", lines[3])
    assert [line.split()[0] for line in lines[4:]] == ["0", "1", "2"]
    assert (tmp_path / "runs" / "first" / "draft" / "config.json").is_file()


def commands(page: str) -> Iterator[list[str]]:
    """Words of every call of specd in a page's indented blocks."""
    text = (TEXT.parent / page).read_text(encoding="utf-8")
    blocks = "\n".join(line for line in text.splitlines() if line.startswith("    ") and "#!" not in line)
    for call in re.findall(r"\bspecd ((?:start|train|plan|stop|status)\b[^\n&;']*)", blocks.replace("\\\n", " ")):
        yield shlex.split(call)


def test_commands_of_the_multi_gpu_page_have_the_options_they_name() -> None:
    root: Any = get_command(app)
    found = list(commands("multi-gpu.md"))
    assert len(found) >= 12
    for verb, *words in found:
        known = {name for option in root.commands[verb].params for name in (*option.opts, *option.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known, (verb, words)
        for key, value in itertools.pairwise(words):
            if key == "--set":
                settings = overrides([value])
                kind = DaemonConfig if verb == "start" else RunConfig
                needed = {"target": {"model": "m"}} if verb == "start" else {"method": "dflash"}
                msgspec.convert(needed | settings, kind)


def test_other_loops_draw_states_as_it_is_written() -> None:
    """tests/oracles/test_adapters.py runs the rest of the page, beside the trainers that it names."""
    code = re.findall(r"```python\n(.*?)```", TEXT.with_name("adapters.md").read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, Any] = {"__name__": "adapters"}
    exec(compile(code, "adapters.md", "exec"), names)
    with hosted() as host:
        ends = [names["train"](host.subscriber_config(), host.context, rank, 2) for rank in range(2)]
        assert ends[0] == ends[1]
        assert ends[0]["epoch"] == 2
        assert names["train"](host.subscriber_config(), host.context, state=ends[0]) == ends[0]
