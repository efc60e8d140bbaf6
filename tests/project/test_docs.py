"""The snippets of docs/use.md run as they stand, in order, as one program."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from chats import write_target

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
