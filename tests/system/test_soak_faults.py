"""Everything at once: two daemons, two trainers, and a hundred random faults; both runs stay exact."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

import attacks
from faults import ASKED, SEED, Daemon, Trainer, daemons, disturb, settled, write_data

FAULTS = 5 * ASKED or 100
EPOCHS = max(2, FAULTS)


def stop(process: int, seconds: float) -> None:
    """SIGSTOP for a while."""
    os.kill(process, signal.SIGSTOP)
    time.sleep(seconds)  # the fault itself
    os.kill(process, signal.SIGCONT)


@pytest.mark.slow
def test_both_runs_stay_exact(tmp_path: Path) -> None:
    data = write_data(tmp_path / "tokens.jsonl")
    done: Counter[str] = Counter()
    attackers: list[subprocess.Popen[bytes]] = []
    with daemons(hang_s=1.0) as start:
        pair = [start(name) for name in "ab"]
        trainers = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            trainers.append(Trainer(tmp_path / name / "run", data, [each.endpoint for each in pair], epochs=EPOCHS))

        def worker(number: signal.Signals) -> Callable[[random.Random], None]:
            def fault(rng: random.Random) -> None:
                status = rng.choice(pair).status()
                if status.state == "serving":  # one that is stopped as it starts does not see that its control dies
                    os.kill(status.worker_pid, number)

            return fault

        def control_killed(rng: random.Random) -> None:
            daemon: Daemon = rng.choice(pair)
            daemon.process.kill()
            daemon.restart()

        def control_stopped(rng: random.Random) -> None:
            stop(rng.choice(pair).process.pid, rng.uniform(0.1, 2.0))

        def trainer_killed(rng: random.Random) -> None:
            rng.choice(trainers).kill_and_resume()

        def trainer_stopped(rng: random.Random) -> None:
            stop(rng.choice(trainers).process.pid, rng.uniform(0.1, 2.0))

        def second_owner(rng: random.Random) -> None:
            """Another process in the directory of a run that goes on."""
            trainer = rng.choice(trainers)
            log = subprocess.run(
                [*trainer.command, "--resume"], capture_output=True, text=True, timeout=60, check=False
            )
            assert log.returncode == 2 or not trainer.running, log.stderr

        def attacked(rng: random.Random) -> None:
            kind = rng.choice(attacks.LOCAL)
            command = [sys.executable, attacks.__file__, rng.choice(pair).endpoint, kind, "2", "1000"]
            attackers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

        kinds = {
            "worker killed": worker(signal.SIGKILL), "worker hung": worker(signal.SIGSTOP),
            "control killed": control_killed, "control stopped": control_stopped, "trainer killed": trainer_killed,
            "trainer stopped": trainer_stopped, "second owner": second_owner, "attacked": attacked,
        }  # fmt: skip

        def fault(rng: random.Random) -> None:
            name = rng.choice(list(kinds))
            kinds[name](rng)
            done[name] += 1

        try:
            count = disturb(trainers, FAULTS, fault)
            first, second = (trainer.finish(600) for trainer in trainers)
        finally:
            for attacker in attackers:
                attacker.wait(30)
            for trainer in trainers:
                trainer.close()
        print(f"seed {SEED}: {count} faults in {len(first)} steps: {dict(done)}")
        assert count == FAULTS, f"seed {SEED}: the runs ended after {count} faults"
        assert first == second, f"seed {SEED}"
        for daemon in pair:
            settled(daemon)
