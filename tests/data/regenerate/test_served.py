"""A real server of OpenAI's API, `transformers serve` in a process of its own, answers as the target does here."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chats import talk, write_rows, write_target
from specd.config.settings import DataConfig
from specd.data.regenerate.job import Progress, Sampling, regenerate
from specd.data.regenerate.local import Local
from specd.data.regenerate.server import Server
from specd.data.tokenizer import load_tokenizer
from specd.errors import ConfigError, TargetError

NEEDED = ("fastapi", "uvicorn", "openai")
ROWS: list[dict[str, Any]] = [
    {"messages": talk("What is the tone of this message?", "old", "And " + "now? " * i), "form": f"f{i}"}
    for i in range(4)
]

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, NEEDED)), reason=f"`transformers serve` needs {', '.join(NEEDED)}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("target"), num_layers=2)


class Served:
    """`transformers serve` of one model. url: of its API."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
        command += ["--port", "0", "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        assert self.process.stderr is not None
        said: list[str] = []
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"running on (http://127.0.0.1:\d+)", line):
                self.url = f"{found[1]}/v1"
                return
        pytest.fail("transformers serve ended: " + "".join(said))

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def served(model: Path) -> Iterator[Served]:
    server = Served(model)
    yield server
    server.kill()


def answers(out: Path) -> list[list[str]]:
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return [[turn["content"] for turn in row["messages"]] for row in rows]


@pytest.mark.timeout(120)
def test_a_real_server_answers_as_the_target_does_here(tmp_path: Path, model: Path, served: Served) -> None:
    """Greedily, turn by turn; killed on the way, the work goes on at another one, to the same file."""
    from transformers import AutoModelForCausalLM

    tokenizer: Any = load_tokenizer(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    config = DataConfig(path=write_rows(tmp_path / "in.jsonl", *ROWS))
    sampling = Sampling(max_new_tokens=7)
    regenerate(config, Local(network, tokenizer, sampling, target="here", batch_size=1), tmp_path / "here.jsonl")

    def kill(progress: Progress) -> None:
        if progress.samples == 2:
            served.kill()

    def ask(url: str) -> Server:
        return Server(url, str(model), sampling, concurrency=2, retries=1, backoff_s=0.01)

    out = tmp_path / "out.jsonl"
    with pytest.raises(ConfigError, match=r"knows no model 'other'|refuses a request with these settings.*'other'"):
        regenerate(config, Server(served.url, "other", sampling), out)
    with pytest.raises(TargetError, match="the same command resumes"):
        regenerate(config, ask(served.url), out, on_answer=kill)
    again = Served(model)
    try:
        done = regenerate(config, ask(again.url), out)
    finally:
        again.kill()
    assert done.samples == 4
    assert answers(out) == answers(tmp_path / "here.jsonl")
