"""The `specd` command: its verbs, its logging, and its exit codes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from specd.cli import bench, data, demo, doctor, eval, keys, plan, report, start, status, stop, top, train
from specd.drafts import registry
from specd.errors import ConfigError, SpecdError
from specd.version import __version__

SERVE, TRAIN, DATA, LOOK = "Serve", "Train", "Data", "Look"


class Verbs(TyperGroup):
    """The verbs in the order in which a newcomer meets them: typer would list groups after all commands."""

    ORDER = (
        "start",
        "status",
        "top",
        "stop",
        "keys",
        "train",
        "eval",
        "report",
        "data",
        "doctor",
        "plan",
        "bench",
        "demo",
    )

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=self.ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # of a verb that says nothing of its own
            typer.echo("specd: interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="specd",
    cls=Verbs,
    help="Serve a target model's hidden states to the training of draft models for speculative decoding.\n\n"
    "Begin with `specd doctor`, then `specd start --model smollm2-135m` and "
    f"`specd train {registry.DEFAULT} --transport auto`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("start", rich_help_panel=SERVE, epilog=start.EXAMPLES)(start.start)
app.command("status", rich_help_panel=SERVE, epilog=status.EXAMPLES)(status.status)
app.command("top", rich_help_panel=SERVE, epilog=top.EXAMPLES)(top.top)
app.command("stop", rich_help_panel=SERVE, epilog=stop.EXAMPLES)(stop.stop)
app.add_typer(keys.app, name="keys", rich_help_panel=SERVE)
app.command("train", rich_help_panel=TRAIN, epilog=train.EXAMPLES, no_args_is_help=True)(train.train)
app.command("eval", rich_help_panel=TRAIN, epilog=eval.EXAMPLES)(eval.evaluate)
app.command("report", rich_help_panel=TRAIN, epilog=report.EXAMPLES)(report.report)
app.add_typer(data.app, name="data", rich_help_panel=DATA)
app.command("doctor", rich_help_panel=LOOK, epilog=doctor.EXAMPLES)(doctor.doctor)
app.command("plan", rich_help_panel=LOOK, epilog=plan.EXAMPLES)(plan.plan)
app.add_typer(bench.app, name="bench", rich_help_panel=LOOK)
app.command("demo", rich_help_panel=LOOK, epilog=demo.EXAMPLES)(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"specd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every step.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Log warnings and errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    log_to_stderr(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever the standard error is by then: a bar that is shown there takes lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def log_to_stderr(level: int) -> None:
    """Give the `specd` logger its one handler, and the level, which worker processes read from SPECD_LOG."""
    logger = logging.getLogger("specd")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    os.environ["SPECD_LOG"] = logging.getLevelName(level)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code: 0, 1 for an error, 2 for a wrong setting, 130 for Ctrl-C."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="specd")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except SpecdError as error:
        print(f"specd: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for a CPU without memory
        if not (isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        print(
            f"specd: error: no memory left on this host: {error}; take smaller settings, or free some", file=sys.stderr
        )
        return 1
    return 0


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())
