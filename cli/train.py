"""`specd train METHOD`: train a draft on the hidden states of a daemon, or of a target hosted in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import replace

from specd.cli.config import as_yaml, run_file
from specd.cli.dry_run import rehearse
from specd.cli.settings import DATA, complete_method, complete_preset, given, paths, servers_of
from specd.cli.training import Job, go
from specd.config.load import merge, overrides
from specd.config.presets import recipe_of, run_config
from specd.config.settings import RunConfig
from specd.drafts import registry
from specd.errors import ConfigError

EXAMPLES = (
    f"Examples: `specd train {registry.DEFAULT} --data chats.jsonl --output runs/first` · "
    f"`specd train {registry.DEFAULT} --endpoint tcp://gpu1:7070 --endpoint tcp://gpu2:7070 --set train.lr=3e-4` · "
    f"`specd train {registry.DEFAULT} --endpoint tcp://gpu1:7070 --key me --server-key PUBLIC` · "
    f"`specd train {registry.DEFAULT} --model smollm2-135m --exact --set target.dtype=bfloat16 --max-steps 50`"
)
STATES, RUN = "Hidden states", "Run"


def train(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help=f"Which draft: {', '.join(registry.BUILTIN)}, or a plug-in's.",
            autocompletion=complete_method,
        ),
    ],
    endpoint: Annotated[
        list[str] | None,
        typer.Option("--endpoint", "-e", help="A daemon; give it again for more.", rich_help_panel=STATES),
    ] = None,
    transport: Annotated[
        str, typer.Option(help="auto, or one by name: that one or an error.", rich_help_panel=STATES)
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Host this target here: no daemon needed.",
            rich_help_panel=STATES,
            autocompletion=complete_preset,
        ),
    ] = "",
    exact: Annotated[
        bool | None,
        typer.Option(
            "--exact/--merged",
            help="With --model: one batch a forward: bit-identical results.",
            rich_help_panel=STATES,
        ),
    ] = None,
    key: Annotated[
        str, typer.Option("--key", help="Over TCP: this trainer's key, by name or path.", rich_help_panel=STATES)
    ] = "",
    server_key: Annotated[
        list[str] | None,
        typer.Option(
            "--server-key",
            help="Over TCP: a daemon's public key; one for all, or one each.",
            metavar="PUBLIC",
            rich_help_panel=STATES,
        ),
    ] = None,
    insecure_data: Annotated[
        bool | None,
        typer.Option("--insecure-data", help="With a key: also nccl and nixl, unencrypted.", rich_help_panel=STATES),
    ] = None,
    share: Annotated[
        str,
        typer.Option(
            help="Share forwards with other trainings that name the same one.", metavar="NAME", rich_help_panel=STATES
        ),
    ] = "",
    depth: Annotated[
        int | None, typer.Option(help="Batches in flight beyond the one in use.", rich_help_panel=STATES)
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            "--preset",
            help="Take this preset's recipe; else the target's own.",
            rich_help_panel=RUN,
            autocompletion=complete_preset,
        ),
    ] = "",
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help=f"{DATA} Give it again for more.", metavar="FILE", rich_help_panel=RUN),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Run directory; else runs/METHOD.", rich_help_panel=RUN)
    ] = "",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --output from its last checkpoint; begin it if there is none.",
            rich_help_panel=RUN,
        ),
    ] = False,
    max_steps: Annotated[
        int | None, typer.Option(min=0, help="Optimizer steps, 0 for all epochs.", rich_help_panel=RUN)
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes of training, 0 for no limit.", rich_help_panel=RUN),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUN)] = "",
    logger: Annotated[
        list[str] | None,
        typer.Option(
            "--logger", help="Also log to tensorboard, wandb, mlflow or trackio; again for more.", rich_help_panel=RUN
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics", help="Prometheus metrics at PORT of this machine, or ADDRESS:PORT.", rich_help_panel=RUN
        ),
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="File of settings, as `specd config` prints it, or a run.json; flags win."),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting by path, e.g. --set train.lr=3e-4.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings of this command as YAML, and do nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print sizes and steps; no target is loaded.")
    ] = False,
) -> None:
    """Train a draft on the hidden states of a target, and export it to OUTPUT/draft.

    Settings, weakest first: the defaults, the recipe of the target's preset, --config, flags, --set.

    A target hosted here (--model) takes the settings of `specd start --model` under `target`: backend, dtype,
    load_format, … It runs on the trainer's device unless target.device names another.
    """
    flags = {
        "output": output,
        "target": {"exact": exact},
        "subscriber": {
            "endpoints": endpoint,
            "transport": transport,
            "depth": depth,
            "share": share,
            "auth": {"key": key, "servers": servers_of(endpoint or [], server_key or [])},
            "insecure_data": insecure_data,
        },
        "data": paths(data or []),
        "train": {"max_steps": max_steps, "max_minutes": max_minutes, "device": device},
        "log": {"to": logger, "metrics": metrics},
    }

    def job() -> Job:
        file = run_file(config) if config else {}
        hosted = model if model or endpoint else str(file.get("target", {}).get("model", ""))
        asked = merge(merge(file, given(flags)), overrides(settings or []))
        if (other := asked.setdefault("method", method)) != method:
            raise ConfigError(f"settings: method={other!r}: expected {method!r}, as the command says; leave it out")
        if method not in registry.names():
            raise ConfigError(f"unknown draft method {method!r}; known here: {', '.join(registry.names())}")

        def settle(target: str) -> RunConfig:
            run = run_config(asked, target or hosted, preset=preset)
            if not hosted:
                return run
            recipe = recipe_of(preset, "") if preset else None  # `specd resume` knows no preset
            return replace(run, target=(recipe.target if recipe else {}) | {"model": hosted} | run.target)

        first = settle("")
        if first.target and not hosted:
            raise ConfigError(
                f"settings: target={first.target}: expected none, as a daemon's target is configured by `specd start`; "
                f"leave them out, or give --model NAME to host the target here"
            )
        return Job(settle=settle, first=first, model=hosted, preset=preset, resume=resume)

    if print_config:
        typer.echo(as_yaml(job().first), nl=False)
    elif dry_run:
        rehearse(job())
    else:
        go(job)
