"""A sweep on one GPU: three methods beside their target for equal time, over cuda_ipc, forwards shared.

Plain attention, as nothing is compiled then: steps come at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faults import write_data
from specd.train.journal import read

MINUTES = 0.3
FILE = f"""
base:
  data: {{path: tokens.jsonl, batch_tokens: 512, max_length: 40}}
  train: {{epochs: 500, max_minutes: {MINUTES}}}
  draft.attention: sdpa
  target.device: cuda:0
  validation.share: 0.1
runs:
  flash: {{method: dflash, draft: {{num_layers: 1, num_taps: 3, block_size: 4, num_anchors: 64, mask_token_id: 255}}}}
  spark: {{method: dspark, draft: {{num_layers: 1, num_taps: 4, block_size: 4, num_anchors: 64, mask_token_id: 255}}}}
  eagle: {{method: eagle3, draft: {{num_steps: 3}}}}
"""
TARGET = "synthetic:hidden=256,layers=8,vocab=256,ms=20"


@pytest.mark.gpu(1)
def test_three_methods_train_for_equal_time_on_one_gpu(tmp_path: Path) -> None:
    write_data(tmp_path / "tokens.jsonl")
    (tmp_path / "three.yaml").write_text(FILE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    command = [sys.executable, "-m", "specd", "sweep", "three.yaml", "-m", TARGET, "--lag-gb", "1", "--devices", "0"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    print(done.stdout)
    logs = {path.name: path.read_text()[-2000:] for path in (tmp_path / "runs" / "three").glob("*.log")}
    assert done.returncode == 0, (done.stderr, logs)
    shared = batches = 0
    for name in ("flash", "spark", "eagle"):
        run = tmp_path / "runs" / "three" / name
        facts = json.loads((run / "run.json").read_bytes())
        assert [*facts["transports"].values()] == ["cuda_ipc"], facts["transports"]
        steps = read(run / "metrics.jsonl")
        longest = max(record.step_s for record in steps)
        assert 60 * MINUTES <= sum(record.step_s for record in steps) <= 60 * MINUTES + 3 * longest
        assert steps[-1].lr < 0.1 * max(record.lr for record in steps), "it has come down"
        shared, batches = shared + sum(record.shared for record in steps), batches + len(steps)
    assert shared >= 0.3 * batches
