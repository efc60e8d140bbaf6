"""Commands of specd that begin within milliseconds: forks of a process that has imported what they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self


class Fork:
    """A command under way. Its output goes to the file `log`."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self._nursery, self.pid, self.log = nursery, pid, log

    def kill(self) -> None:
        self._nursery.ask({"kill": self.pid})

    def wait(self) -> int:
        """Its exit code, negative for a signal's number."""
        return self._nursery.ask({"wait": self.pid})


class Nursery:
    """Starts commands; at its end all of them are over."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)

    def start(self, log: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Fork:
        asked: dict[str, object] = {"log": str(log), "arguments": [*arguments], "environment": environment or {}}
        return Fork(self, self.ask(asked), log)

    def ask(self, what: dict[str, object]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def command(log: str, arguments: list[str]) -> int:
    """The exit code of one command, in a process of its own."""
    from specd.cli.main import run

    with open(log, "ab") as file, open(os.devnull, "rb") as null:
        for stream, number in ((null, 0), (file, 1), (file, 2)):
            os.dup2(stream.fileno(), number)
    code = run(arguments)
    sys.stdout.flush()
    return code


def main() -> None:
    """One order a line, one number a line in answer; at the end of input the children are killed."""
    import torch._dynamo  # noqa: F401  # by the first optimizer
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import specd.daemon.serve
    import specd.drafts.dflash.objective
    import specd.drafts.eagle3.objective
    import specd.targets.synthetic
    import specd.train.trainer
    import specd.transports.registry  # noqa: F401

    children: set[int] = set()
    for line in sys.stdin:
        match json.loads(line):
            case {"log": log, "arguments": arguments, "environment": environment}:
                answer = os.fork()
                if not answer:
                    code = 70
                    os.environ |= environment
                    try:
                        code = command(log, arguments)
                    finally:
                        os._exit(code)
                children.add(answer)
            case {"kill": pid}:
                os.kill(pid, 9)
                answer = 0
            case {"wait": pid}:
                answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                children.discard(pid)
            case _:
                raise ValueError(line)
        print(answer, flush=True)
    for pid in children:
        os.kill(pid, 9)


if __name__ == "__main__":
    main()
