"""`specd train METHOD`: train a draft on the hidden states of a daemon, or of a target hosted in this process."""

from __future__ import annotations

import functools
import json
import shlex
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import replace

from specd.cli.ranks import as_rank, is_one_of_several
from specd.cli.settings import DATA, given, hosting_config, paths, servers_of
from specd.config.load import load_yaml, merge, overrides
from specd.config.presets import run_config
from specd.config.settings import Config, RunConfig, SubscriberConfig, TargetConfig
from specd.drafts import registry
from specd.errors import ConfigError
from specd.transports.registry import WITHIN_PROCESS

if TYPE_CHECKING:
    from specd.train.distributed import Ranks
    from specd.train.interrupt import Interrupt
    from specd.train.trainer import LocalDaemon, TrainedRun

EXAMPLES = (
    f"Examples: `specd train {registry.DEFAULT} --data chats.jsonl --output runs/first` · "
    f"`specd train {registry.DEFAULT} --endpoint tcp://gpu1:7070 --endpoint tcp://gpu2:7070 --set train.lr=3e-4` · "
    f"`specd train {registry.DEFAULT} --endpoint tcp://gpu1:7070 --key me --server-key PUBLIC` · "
    f"`specd train {registry.DEFAULT} --model smollm2-135m --exact --set target.dtype=bfloat16 --max-steps 50`"
)
STATES, RUN = "Hidden states", "Run"


def train(
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help=f"Which draft: {', '.join(registry.BUILTIN)}, or a plug-in's.")
    ],
    endpoint: Annotated[
        list[str] | None,
        typer.Option("--endpoint", "-e", help="A daemon; give it again for more.", rich_help_panel=STATES),
    ] = None,
    transport: Annotated[
        str, typer.Option(help="auto, or one by name: that one or an error.", rich_help_panel=STATES)
    ] = "",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Host this target here: no daemon needed.", rich_help_panel=STATES)
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
        str, typer.Option("--preset", help="Take this preset's recipe; else the target's own.", rich_help_panel=RUN)
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
        Path | None, typer.Option("--config", "-c", help="YAML file of a RunConfig; flags win over it.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting by path, e.g. --set train.lr=3e-4.")
    ] = None,
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
        "train": {"max_steps": max_steps, "device": device},
        "log": {"to": logger, "metrics": metrics},
    }

    @functools.cache
    def asked() -> dict[str, Any]:
        found = merge(merge(load_yaml(config) if config else {}, given(flags)), overrides(settings or []))
        if (other := found.setdefault("method", method)) != method:
            raise ConfigError(f"settings: method={other!r}: expected {method!r}, as the command says; leave it out")
        if method not in registry.names():
            raise ConfigError(f"unknown draft method {method!r}; known here: {', '.join(registry.names())}")
        return found

    def settle(target: str) -> RunConfig:
        run = run_config(asked(), target or model, preset=preset)
        return replace(run, target={"model": model} | run.target) if model else run

    def work(ranks: Ranks | None, interrupt: Interrupt) -> None:
        from specd.train.trainer import train_draft

        first = settle("")
        if model:
            _check_link(first.subscriber, model)
        if first.target and not model:
            raise ConfigError(
                f"settings: target={first.target}: expected none, as a daemon's target is configured by `specd start`; "
                f"leave them out, or give --model NAME to host the target here"
            )
        host = _host(first, model, preset, resume, ranks) if model else None
        done = train_draft(settle, host=host, resume=resume, interrupt=interrupt, show=True, ranks=ranks)
        if ranks is None or ranks.leads:
            _say_done(done)

    def interrupted() -> str:
        from specd.train.trainer import output_of

        run = output_of(settle(""))
        remedy = (
            f"continue with the same command and --resume (output {run.path})"
            if run.begun
            else "nothing was trained yet: give the same command again"
        )
        return f"specd: interrupted; {remedy}"

    if is_one_of_several():
        as_rank(work, interrupted)
        return
    from specd.train.interrupt import Interrupt

    try:
        with Interrupt() as interrupt:
            work(None, interrupt)
    except KeyboardInterrupt:
        typer.echo(interrupted(), err=True)
        raise typer.Exit(130) from None


def _say_done(done: TrainedRun) -> None:
    by = f" by {done.ranks} ranks" if done.ranks > 1 else ""
    if done.was_finished:
        typer.echo(f"{done.directory} is finished: {done.steps} steps trained; draft in {done.draft}")
        return
    typer.echo(f"{done.steps} steps trained{by}; draft in {done.draft}")
    draft, directory = (shlex.quote(str(path)) for path in (done.draft, done.directory))
    typer.echo(f"next: specd eval --draft {draft} --untrained, then specd report {directory}")


def _check_link(link: SubscriberConfig, model: str) -> None:
    """Raise ConfigError for settings of a connection to a daemon, which hosting `model` here would ignore."""
    if link.endpoints != SubscriberConfig().endpoints:
        raise ConfigError(
            f"--model {model} hosts the target here, --endpoint {link.endpoints[0]} uses a daemon: give one"
        )
    if link.share:
        raise ConfigError(
            f"share {link.share!r}: expected none, as --model {model} hosts the target for this run alone; leave it "
            f"out, or give --endpoint of a daemon that others train from, too"
        )
    if link.transport not in ("auto", WITHIN_PROCESS):
        raise ConfigError(
            f"transport {link.transport!r}: expected auto or {WITHIN_PROCESS}, as --model {model} hosts the target "
            f"here; leave it out, or give --endpoint of a daemon in place of --model"
        )


def _host(
    run: RunConfig, model: str, preset: str, resume: bool, ranks: Ranks | None
) -> AbstractContextManager[LocalDaemon]:
    """Check all settings; the context then hosts `model` in this process, of several ranks on this one's device."""
    from specd.daemon.serve import embedded
    from specd.train.trainer import check, check_recipe, output_of

    if ranks is not None:
        run = replace(run, train=replace(run.train, device=check(run, ranks.launch)))
    daemon = hosting_config(run, model, preset=preset)
    draft = check_recipe(run, model)
    if not (resume and output_of(run).begun):  # a run that goes on keeps its mask token
        _check_mask(draft, daemon.target)
    return embedded(daemon)


def _check_mask(draft: Config, target: TargetConfig) -> None:
    """Raise ConfigError for a mask token that will not do, or when none can be chosen, before the target is loaded."""
    from specd.data.samples import vocabulary
    from specd.targets.source import TOKENIZER_FILES, resolve, with_tokenizer
    from specd.train.preparation import check_mask, mask_of

    if mask_of(draft) is None:
        return
    try:
        found = resolve(target.model, need="shape" if target.load_format == "dummy" else "tokenizer")
        source = with_tokenizer(found, target.tokenizer)
    except ConfigError:  # not of a checkpoint: what its backend says of it is said by the trainer
        return
    with TemporaryDirectory(prefix="specd-target-") as scratch:
        files = {"config.json": json.dumps(source.config).encode()}
        files |= {name: data for name in TOKENIZER_FILES if (data := source.file(name)) is not None}
        for name, data in files.items():
            (Path(scratch) / name).write_bytes(data)
        check_mask(draft, Path(scratch), vocabulary(Path(scratch)), target.model)
