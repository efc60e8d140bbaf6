"""What holds for the oracles: the peers' packages are at hand."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from peers import FOLDER

# Read by torch and vLLM when they are first imported. Peers compile what runs here a few times, on a CPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["VLLM_TARGET_DEVICE"] = "cpu"


def pytest_sessionstart() -> None:
    """Fail where the peers are missing: an oracle that is skipped tells nothing."""
    if not (FOLDER / "peers.txt").is_file():
        pytest.exit(f"no peers in {FOLDER}: run `make test-oracles`, or set SPECD_PEERS to their folder", returncode=1)
    listed = Path(__file__).with_name("peers.txt")
    if (FOLDER / "peers.txt").read_bytes() != listed.read_bytes():
        pytest.exit(f"{FOLDER} has other versions than {listed}: run `make test-oracles` again", returncode=1)
    assert "torch" not in sys.modules, "it reads TORCHDYNAMO_DISABLE when it is imported"
