"""The `specd` command: its verbs, its logging, and its exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from specd import log
from specd.cli import (
    bench,
    config,
    data,
    demo,
    doctor,
    eval,
    export,
    keys,
    plan,
    push,
    replay,
    report,
    resume,
    start,
    status,
    stop,
    sweep,
    top,
    train,
)
from specd.cli.furnish import furnish, log_in, log_to_stderr
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
        "replay",
        "keys",
        "train",
        "resume",
        "sweep",
        "eval",
        "export",
        "push",
        "report",
        "data",
        "config",
        "doctor",
        "plan",
        "bench",
        "demo",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        furnish(self)

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
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("start", rich_help_panel=SERVE, epilog=start.EXAMPLES)(start.start)
app.command("status", rich_help_panel=SERVE, epilog=status.EXAMPLES)(status.status)
app.command("top", rich_help_panel=SERVE, epilog=top.EXAMPLES)(top.top)
app.command("stop", rich_help_panel=SERVE, epilog=stop.EXAMPLES)(stop.stop)
app.command("replay", rich_help_panel=SERVE, epilog=replay.EXAMPLES)(replay.replay)
app.add_typer(keys.app, name="keys", rich_help_panel=SERVE)
app.command("train", rich_help_panel=TRAIN, epilog=train.EXAMPLES, no_args_is_help=True)(train.train)
app.command("resume", rich_help_panel=TRAIN, epilog=resume.EXAMPLES)(resume.resume)
app.command("sweep", rich_help_panel=TRAIN, epilog=sweep.EXAMPLES, no_args_is_help=True)(sweep.sweep)
app.command("eval", rich_help_panel=TRAIN, epilog=eval.EXAMPLES)(eval.evaluate)
app.command("export", rich_help_panel=TRAIN, epilog=export.EXAMPLES)(export.export)
app.command("push", rich_help_panel=TRAIN, epilog=push.EXAMPLES)(push.push)
app.command("report", rich_help_panel=TRAIN, epilog=report.EXAMPLES)(report.report)
app.add_typer(data.app, name="data", rich_help_panel=DATA)
app.command("config", rich_help_panel=LOOK, epilog=config.EXAMPLES)(config.config)
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
    log_format: Annotated[
        str, typer.Option("--log-format", help="text, or json: an object a line; the workers' lines, too.")
    ] = "",
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    if log_format:
        log_in(log_format)
    log_to_stderr(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return the exit code: 0, 1 for an error, 2 for a wrong setting, 130 for Ctrl-C."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="specd")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except SpecdError as error:
        _say("\n".join([str(error), *getattr(error, "__notes__", ())]))
        return 2 if isinstance(error, ConfigError) else 1
    except (MemoryError, RuntimeError) as error:  # torch has no class of its own for a CPU without memory
        if not (isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            raise
        _say(f"no memory left on this host: {error}; take smaller settings, or free some")
        return 1
    return 0


def _say(error: str) -> None:
    if log.as_json():
        logging.getLogger("specd").error("%s", error)
    else:
        print(f"specd: error: {error}", file=sys.stderr)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())
