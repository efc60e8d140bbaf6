"""The pages of docs/: each is on the site, links lead somewhere, and what they name exists as they name it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from specd.cli.main import app
from specd.config import describe
from specd.config.presets import preset, presets
from specd.config.settings import DaemonConfig, RunConfig
from specd.drafts import registry
from specd.drafts.taps import spread_taps
from specd.protocol.batch import slot_bytes
from specd.protocol.capture import CaptureSpec
from specd.units import size

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
SECTIONS = "data|train|log|subscriber|ring|capture|target|draft"
SETTING = re.compile(rf"(?<![\w./-])((?:{SECTIONS})(?:\.[a-z_0-9]+)+)(?==|`|\b)")
FILES = re.compile(r"\.(jsonl?|md|ya?ml|py|safetensors|npy|gguf|html|parquet|txt|pt)$")


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def of_the_site() -> Iterator[str]:
    todo: list[Any] = list(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    while todo:
        entry = todo.pop()
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                todo += value if isinstance(value, list) else [value]


def test_every_page_is_on_the_site() -> None:
    assert sorted(of_the_site()) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = [target for target, _ in LINK.findall(text_of(page)) if "://" not in target]
    assert [target for target in targets if not (DOCS / target).exists()] == []


def commands(page: str) -> Iterator[list[str]]:
    """The words of each `specd …` of a page, in its blocks and lines, up to what ends a command of a shell."""
    text = re.sub(r"\\\n\s*", " ", text_of(page))
    blocks = [line for line in text.splitlines() if line.startswith("    ")]
    for line in blocks + re.findall(r"`(specd [^`]+)`", text):
        for found in re.finditer(r"(?:^|[ ;&$]|-m )specd ([a-z]\S*.*)", line):
            words = re.split(r"\s#\s|\s[|>&;]|;|…", found[1])[0]
            try:
                yield shlex.split(words)
            except ValueError:  # a quote that a longer script opened
                yield words.split()


@cache
def root() -> Any:
    return typer.main.get_command(app)


def problem(words: list[str]) -> str:
    """What a command names that is not there."""
    command, rest = root(), list(words)
    while rest and (verbs := getattr(command, "commands", {})):
        name = rest.pop(0)
        if name not in verbs:
            return f"no command {name!r}: {' '.join(words)}"
        command = verbs[name]
    known = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
    unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.split("=")[0] not in known]
    return f"no flag {unknown}: {' '.join(words)}" if unknown else ""


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_exist(page: str) -> None:
    assert [found for words in commands(page) if (found := problem(words))] == []


def settings() -> set[str]:
    """Every setting's path, and those of sections within sections."""
    found: set[str] = set()
    roots: list[tuple[str, Any]] = [("", DaemonConfig), ("", RunConfig)]
    roots += [("draft.", registry.load(name).settings) for name in registry.names()]
    for prefix, struct in roots:
        for path, _, _ in describe.settings(struct, prefix):
            found |= {path, path.rpartition(".")[0]}
    return found


def test_settings_exist() -> None:
    known = settings()
    free = ("data.template.", "data.columns.", "subscriber.auth.", "draft.parameters")
    unknown = [
        (page, name)
        for page in PAGES
        for name in SETTING.findall(re.sub(r"data\.train_data_path|data\.chat_template", "", text_of(page)))
        if name not in known and not name.startswith(free) and not FILES.search(name)
    ]
    assert unknown == []


def test_what_is_wrong_is_found() -> None:
    assert problem(["trian", "dflash"])
    assert problem(["train", "dflash", "--outptu", "x"])
    assert not problem(["train", "dflash", "--output", "x", "--set", "train.lr=1"])
    assert "train.lr" in settings()
    assert "draft.num_steps" in settings()
    assert SETTING.findall("`--set train.lr=3` and draft.num_steps, not metrics.train.lr") == [
        "train.lr",
        "draft.num_steps",
    ]


def rows(page: str) -> Iterator[list[str]]:
    for line in text_of(page).splitlines():
        if line.startswith("|"):
            yield [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def test_the_table_of_recipes_is_that_of_the_presets() -> None:
    named = {row[0]: row for row in rows("recipes.md") if preset(row[0])}
    assert set(named) == set(presets())
    for name, row in named.items():
        found = preset(name)
        assert found is not None
        block, eagle = (found.run[method]["draft"] for method in ("dflash", "eagle3"))
        taps = ", ".join(map(str, spread_taps(found.config["num_hidden_layers"], block["num_taps"])))
        mask = str(block["mask_token_id"]) if "mask_token_id" in block else "chosen"
        widths = [one.get("intermediate_size") or found.config["intermediate_size"] for one in (block, eagle)]
        shape = f"{block['num_layers']} × {widths[0]:,}"
        assert row[1:5] == [taps, mask, shape, f"{widths[1]:,}"]


@pytest.mark.parametrize(
    ("row", "hidden", "taps", "final", "tokens"),
    [(0, 4096, 5, False, 3072), (1, 4096, 3, True, 4096), (2, 2048, 5, False, 3072), (3, 2880, 5, False, 3072)],
)
def test_sizes_are_what_a_ring_takes(row: int, hidden: int, taps: int, final: bool, tokens: int) -> None:
    table = [cells for cells in rows("sizes.md") if len(cells) == 5 and ("Qwen3" in cells[0] or "gpt" in cells[0])]
    spec = CaptureSpec(taps=tuple(range(taps)), final=final, dtype="bfloat16")
    one = slot_bytes(spec, hidden, tokens)
    assert table[row][2:] == [str(taps + final), size(one), size(3 * one)]


def test_the_compose_file_is_yaml_and_its_commands_exist() -> None:
    services = yaml.safe_load((DOCS / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"]
    assert [problem(service["command"]) for service in services.values()] == ["", ""]
