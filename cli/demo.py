"""`specd demo`: the main job on a small real model, from weights to report, in the commands a person would type."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Self

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from specd.cli.children import Children, ready
from specd.cli.training import then
from specd.drafts import registry
from specd.errors import ConfigError
from specd.train.interrupt import Interrupt
from specd.train.owner import LOCK, owned

EXAMPLES = "Examples: `specd demo` · `specd demo --method eagle3` · `specd demo --quick --output runs/first-look`"
MODEL = "smollm2-135m"


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run.")] = Path("runs/demo"),
    method: Annotated[
        str, typer.Option("--method", help=f"Which draft: {', '.join(registry.BUILTIN)}, or a plug-in's.")
    ] = registry.DEFAULT,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps and prompts only, to show the path.")] = False,
) -> None:
    """Run everything once on two cores: daemon, answers by the target, training, evaluation, report."""
    from specd.targets.source import resolve

    registry.load(method)  # before anything is done for it
    steps, prompts = (["--max-steps", "12"], 2) if quick else ([], 10)
    run = output / "run"
    answers = output / "answers.jsonl"
    began = time.monotonic()
    with ExitStack() as stack:
        stack.enter_context(owned(output))
        remove_run(run)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="specd-"))
        stage = stack.enter_context(Stage(stack.enter_context(Interrupt())))
        endpoint = f"ipc://{directory}/demo.sock"
        with stage.step(f"Convert {MODEL} once, from the package that carries its weights"):
            stage.say(f"in {resolve(MODEL).path}")
        with stage.step("Start a daemon that hosts the target, as a process of its own"):
            stage.serve(output / "daemon.log", "start", "--model", MODEL, "--endpoint", endpoint)
        with stage.step("Let the target answer a few prompts, as it did for the shipped training set"):
            stage.run(
                *("data", "regenerate", "specd:demo/heldout.jsonl", "--model", MODEL),
                *("--max-samples", "4", "--max-new-tokens", "64", "--output", str(answers), "--overwrite"),
            )
            stage.run("data", "show", str(answers), "--model", MODEL)
        with stage.step(f"Train a draft ({method}) on the daemon's hidden states"):
            stage.run("train", method, "--endpoint", endpoint, "--transport", "auto", "--output", str(run), *steps)
        with stage.step("Ask the daemon what it did, and stop it"):
            stage.run("status", "--endpoint", endpoint)
            stage.run("stop", "--endpoint", endpoint)
        with stage.step("Decode held-out prompts with the draft before and after training"):
            stage.run("eval", "--draft", str(run), "--untrained", "--limit", str(prompts), "--max-new-tokens", "36")
        with stage.step("Write the report"):
            stage.run("report", str(run))
        summarise(stage, run, time.monotonic() - began)
    then(
        *activation(),
        f"specd data regenerate CHATS.jsonl --model {MODEL} --output answers.jsonl",
        f"specd train {method} --model {MODEL} --data answers.jsonl --output runs/first",
        f"specd export {shlex.quote(str(run))} --to drafts/demo",
    )


def activation() -> list[str]:
    """What has a shell find this copy's `specd`, where it does not."""
    own = Path(sys.prefix, "bin")
    if shutil.which("specd") == str(own / "specd") or not (own / "activate").is_file():
        return []
    place = own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own
    return [f". {shlex.quote(str(place / 'activate'))}"]


def remove_run(run: Path) -> None:
    """Remove an earlier run to make room for a new one.

    Raises ConfigError for anything that is no run, and for one in which a process trains.
    """
    from specd.train.directory import FACTS

    if not run.exists():
        return
    with owned(run):
        entries = [path for path in run.iterdir() if path.name != LOCK]
        if entries and not (run / FACTS).is_file():
            raise ConfigError(
                f"{str(run)!r} exists and holds no run ({FACTS}), so the demo does not replace it: "
                f"remove it, or choose another --output"
            )
        # The facts last: what is left by a removal that was cut short is still a run.
        for path in sorted(entries, key=lambda path: path.name == FACTS):
            try:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            except OSError as error:
                raise ConfigError(f"cannot remove the run in {str(run)!r}: {error}; choose another --output") from None


class Stage:
    """Runs the demo's commands, visibly, as child processes, which never outlive it."""

    __slots__ = ("_children", "_console", "_log", "times")

    def __init__(self, interrupt: Interrupt, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._children = Children(interrupt)
        self._log: IO[bytes] | None = None
        self.times: list[tuple[str, float]] = []
        """Each step's title and seconds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Stage({len(self.times)} steps done, {self._children!r})"

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One step under its heading, timed."""
        self._console.rule(f"[bold]{len(self.times) + 1}. {title}", align="left")
        began = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - began))
        self._console.print(f"[dim]{self.times[-1][1]:.1f} s[/]\n")

    def say(self, text: str) -> None:
        """One line of the demo's own."""
        self._console.print(text, markup=False)

    def show(self, title: str, content: Table) -> None:
        """A closing section of the demo's own."""
        self._console.rule(f"[bold]{title}", align="left")
        self._console.print(content)

    def run(self, *arguments: str) -> None:
        """Run one command to its end. Leaves the demo with the command's exit code when it fails."""
        child = self._spawn(arguments, signal.SIGTERM)
        code = child.wait()
        self._children.forget(child)
        if code:
            self._console.print(f"[red]`specd {arguments[0]}` failed with exit code {code}: the demo ends here[/]")
            raise typer.Exit(code if code > 0 else 128 - code)

    def serve(self, log: Path, *arguments: str) -> None:
        """Start a daemon and wait for its ready line. Its log goes to a file."""
        self._log = open(log, "wb")  # noqa: SIM115 (closed with the stage)
        self.say(ready(self._spawn(arguments, signal.SIGINT, stdout=subprocess.PIPE, stderr=self._log), log))

    def close(self) -> None:
        """End every running child, the youngest first: by its signal, then by SIGKILL. Idempotent."""
        if self._children.running:
            self._console.print("[dim]stopping child processes[/]")
        self._children.close()
        if self._log is not None:
            self._log.close()

    def _spawn(
        self,
        arguments: tuple[str, ...],
        end: signal.Signals,
        stdout: int | None = None,
        stderr: IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        self._console.print(f"[bold cyan]$[/] specd {shlex.join(arguments)}", soft_wrap=True)
        return self._children.start(arguments, end, stdout=stdout, stderr=stderr)


def summarise(stage: Stage, run: Path, seconds: float) -> None:
    """Print the results of the demo."""
    import msgspec

    from specd.evaluate.results import EVALS, EvalFacts
    from specd.train.directory import JOURNAL
    from specd.train.journal import read

    before, after = (
        msgspec.json.decode((run / EVALS[name]).read_bytes(), type=EvalFacts) for name in ("untrained", "trained")
    )
    records = read(run / JOURNAL)
    total = sum(record.step_s for record in records)
    shares = {
        "waiting for the target": sum(record.target_wait_s for record in records),
        "waiting for the wire": sum(record.wire_wait_s for record in records),
        "training": sum(record.train_s for record in records),
    }
    split = ", ".join(f"{share / total:.0%} {name}" for name, share in shares.items())
    was, now = before.acceptance_length, after.acceptance_length
    lines = {
        "acceptance length": f"{was:.3f} before training, {now:.3f} after, on {after.prompts} held-out prompts",
        "": after.result.definition,
        "identical outputs": f"{before.identical} of {before.prompts} before, {after.identical} of {after.prompts} "
        "after: each equals the target's own greedy text token for token",
        "training": f"{len(records)} steps in {total:.0f} s: {split}",
        "time": f"{seconds:.0f} s in all",
        "report": str(run / "report.html"),
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(name, Text(text))
    stage.show("Summary", table)
