"""Every example of docs/data.md is read, and gives the labels that stand below it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from chats import write_tokenizer
from specd.config.load import convert, overrides
from specd.config.settings import DataConfig
from specd.data import forms
from specd.data.dataset import prepare
from specd.data.faults import RowError
from specd.data.rows import read_rows
from specd.data.tokenizer import load_tokenizer
from specd.errors import DataError

TEXT = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
CHATML_WITH_TOOLS = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    '{{ \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' + call.function.arguments | tojson }}'
    "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Example(NamedTuple):
    """line: of the page. labels: texts, or token ids."""

    line: int
    row: str
    config: dict[str, Any]
    labels: list[str]


def examples() -> list[Example]:
    pattern = r"(?:^With (`--set .*`):\n\n)?```json\n(.*)\n```\n\nLabels: (.*)$"
    found = []
    for match in re.finditer(pattern, TEXT, re.MULTILINE):
        settings = re.findall(r"--set (\S+?)(?=`| )", match[1] or "")
        labels = re.findall(r"\d+", match[3]) if match[3].startswith("tokens") else re.findall(r"`(.*?)`", match[3])
        assert labels or match[3] == "none"
        line = TEXT.count("\n", 0, match.start(2)) + 1
        config = overrides(settings).get("data", {})
        found.append(Example(line, match[2], config, [label.replace("\\n", "\n") for label in labels]))
    return found


def test_every_example_is_one_that_is_tested() -> None:
    assert TEXT.count("```json") == len(examples()) > 15
    assert any(example.config for example in examples())


@pytest.mark.parametrize("example", examples(), ids=lambda example: f"line {example.line}")
def test_an_example_gives_the_labels_below_it(example: Example, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(example.row + "\n", encoding="utf-8")
    given = {"path": str(tmp_path / "data.jsonl"), "cache_dir": str(tmp_path / "cache"), "processes": 1}
    config = convert({**given, **example.config}, DataConfig, "docs/data.md")
    ((where, row),) = read_rows(str(tmp_path / "data.jsonl"))
    assert not isinstance(row, RowError)
    form = forms.read(row, where, config)
    target = write_tokenizer(tmp_path / "target", CHATML_WITH_TOOLS)
    if not example.labels:
        assert isinstance(form, forms.Conversation)
        assert forms.questions(form, where)
        with pytest.raises(DataError, match="none of the 1 rows"):
            prepare(config, target)
        return
    data = prepare(config, target)
    tokens, mask = data.tokens(0).tolist(), data.loss_mask(0).tolist()
    if isinstance(form, forms.Tokens):
        assert [str(token) for token, label in zip(tokens, mask, strict=True) if label] == example.labels
        return
    tokenizer: Any = load_tokenizer(target)
    runs: list[list[int]] = [[]]
    for token, label in zip(tokens, mask, strict=True):
        if label:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    assert [tokenizer.decode(run) for run in runs if run] == example.labels


def test_every_column_and_role_and_setting_is_on_the_page() -> None:
    from specd.data.files import SUFFIXES
    from specd.data.turns import ROLES

    names = [*forms.COLUMNS, *ROLES, *DataConfig.__struct_fields__, *SUFFIXES]
    own = {"form", "assistant_mask"}
    assert [name for name in names if f"`{name}" not in TEXT and name not in own] == []


def test_every_fault_is_on_the_page() -> None:
    """As the code names them: the second argument of RowError."""
    source = "".join(
        (Path(forms.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        for name in ("files", "forms", "turns", "tools", "tokens")
    )
    kinds = set(re.findall(r'RowError\(\s*where,\s*"([a-zA-Z ]+)"', source)) | {"tools that are no JSON"}
    assert len(kinds) > 15
    table = TEXT.partition("| fault |")[2].partition("\n\n")[0]
    assert {kind for kind in kinds if kind not in table} == {"no question"}
    assert json.loads(examples()[0].row)["messages"]
