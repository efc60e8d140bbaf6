"""Files of several runs: base and own settings, paths as keys, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from specd.config.sweep import read_sweep
from specd.errors import ConfigError

GOOD = """
base: {data: {path: a.jsonl}, train.lr: 1e-3, train.epochs: 2}
runs:
  a: {method: eagle3, draft.num_taps: 5, train: {epochs: 1}}
  2: {method: dflash, draft: {num_layers: 1}, draft.block_size: 8}
"""


def write(path: Path, text: str) -> Path:
    file = path / "sweep.yaml"
    file.write_text(text)
    return file


def test_a_run_has_what_base_has_and_its_own_on_top(tmp_path: Path) -> None:
    found = read_sweep(write(tmp_path, GOOD), {"train": {"lr": 0.5}})
    data = {"path": "a.jsonl"}
    assert found == {
        "a": {"data": data, "train": {"lr": 0.5, "epochs": 1}, "method": "eagle3", "draft": {"num_taps": 5}},
        "2": {
            "data": data,
            "train": {"lr": 0.5, "epochs": 2},
            "method": "dflash",
            "draft": {"num_layers": 1, "block_size": 8},
        },
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: {}", "runs is None: expected settings by name"),
        ("runs: {}", "runs is {}: expected settings by name"),
        ("run: {a: {}}", "unknown key 'run', expected base and runs; did you mean runs?"),
        ("train.lr: 1\nruns: {a: {}}", "unknown key 'train.lr'.*settings that all runs have go under base"),
        ("runs: {a: {}}", "run a: it has no method"),
        ("runs: {a: 3}", "run a is 3: expected settings"),
        ("base: [1]\nruns: {a: {}}", r"base is \[1\]: expected settings"),
        ("runs: {a/b: {method: x}}", "run 'a/b': expected letters"),
        ("runs: {..: {method: x}}", "run '..': expected letters"),
        ("runs: {null: {method: x}}", "run None: expected a name, in quotes"),
        (f"runs: {{{'a' * 101}: {{method: x}}}}", "run 'a+': expected letters.* at most 100"),
        ("runs: {a: {method: x}, a.log: {method: x}}", "run 'a.log': a log has that name: choose another"),
        ("runs: {daemon: {method: x}}", "run 'daemon': a log has that name: choose another"),
        ("runs: {a: {method: x, train.lrr: 1}}", "run a: .*unknown field `lrr` .*did you mean train.lr?"),
        ("runs: {a: {method: x, train: {epochs: 0}}}", r"run a: Expected `int` >= 1, got 0 - at `\$.train.epochs`"),
        ("runs: {a: {method: x, train.: 1}}", "run a: 'train.': expected a path"),
        ("runs: {a: {method: x, train.lr: 1, train: {lr: 2}}}", "run a: train is given twice"),
        ("runs: {a: {method: x, train: 1, train.lr: 2}}", "run a: train.lr and train are both given"),
        ("base: {output: x}\nruns: {a: {method: x}}", "run a: output 'x': expected none"),
        ("runs: {a: {method: x, target.dtype: float32}}", "run a: target: expected it under base"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_clear_error(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"sweep '.*sweep.yaml': {said}"):
        read_sweep(write(tmp_path, text), {})
