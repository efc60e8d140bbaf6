"""What `make newest` asks pip for, and whom it blames."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from newest import APART, EXTRAS, declared, holders, open_ended

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("bounded", "found"),
    [
        ("torch>=2.9,<2.15", "torch>=2.9"),
        ("pyright[nodejs]>=1.1.400,<1.2", "pyright[nodejs]>=1.1.400"),
        ("sglang==0.5.23", "sglang"),
        ("x>=1,!=1.5,~=1.2", "x!=1.5,>=1"),
    ],
)
def test_upper_bounds_go(bounded: str, found: str) -> None:
    from packaging.requirements import Requirement

    assert Requirement(open_ended(bounded)) == Requirement(found)


def test_everything_that_is_declared_is_asked_for() -> None:
    asked = [open_ended(one) for one in declared()]
    assert {"torch>=2.9", "pytest>=8.3"} <= set(asked)
    assert not any("<" in one for one in asked)
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if "--no-deps" in line)
    assert line.split("--no-deps ")[1].split() == [*APART]
    assert set(EXTRAS) > {"dev", "demo", "report", "hub", "nixl"}, "what the Makefile's own environment has"


def test_who_holds_a_version_back_is_named() -> None:
    requirements = {
        "old": ["Hub_client<2", "torch"],
        "fine": ["hub-client>=1"],
        "elsewhere": ["hub-client<1; sys_platform == 'win32'", "hub-client<1; extra == 'more'"],
    }
    assert holders("hub-client", "2.1", requirements) == ["old wants Hub_client<2"]
    assert holders("torch", "2.15", requirements) == []


def test_tests_refuse_other_versions_than_they_are_told() -> None:
    environment = {"PATH": "/usr/bin:/bin", "SPECD_VERSIONS": "numpy==0.1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_units.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the environment has numpy 2." in done.stdout + done.stderr
    assert ", not 0.1" in done.stdout + done.stderr
