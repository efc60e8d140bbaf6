"""`specd train`: train a draft on the hidden states of a daemon, or of a target hosted in this process."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer
from msgspec.structs import replace

from specd.config.load import convert, load_yaml, merge, overrides
from specd.config.presets import preset
from specd.config.settings import DaemonConfig, RunConfig
from specd.errors import ConfigError, TransportError

if TYPE_CHECKING:
    from specd.data.dataset import Dataset
    from specd.drafts.dflash.objective import DFlash
    from specd.protocol.contract import TargetContract
    from specd.train.directory import RunFacts
    from specd.train.interrupt import Interrupt

EXAMPLES = (
    "Examples: `specd train dflash --data chats.jsonl --output runs/first` · "
    "`specd train dflash --endpoint tcp://gpu1:7070 --endpoint tcp://gpu2:7070 --set train.lr=3e-4` · "
    "`specd train dflash --model smollm2-135m --exact --set target.dtype=bfloat16 --max-steps 50`"
)
STATES, RUN = "Hidden states", "Run"

app = typer.Typer(help="Train a draft on the hidden states of a target.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Train a draft on the hidden states of a target."""


@app.command(epilog=EXAMPLES)
def dflash(
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
    depth: Annotated[
        int | None, typer.Option(help="Batches in flight beyond the one in use.", rich_help_panel=STATES)
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="JSONL, Parquet or hub name; else the preset's.", rich_help_panel=RUN)
    ] = "",
    output: Annotated[str, typer.Option("--output", "-o", help="Run directory.", rich_help_panel=RUN)] = "",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in --output from its last checkpoint.", rich_help_panel=RUN),
    ] = False,
    max_steps: Annotated[
        int | None, typer.Option(min=0, help="Optimizer steps, 0 for all epochs.", rich_help_panel=RUN)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUN)] = "",
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of a RunConfig; flags win over it.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting by path, e.g. --set train.lr=3e-4.")
    ] = None,
) -> None:
    """Train a DFlash draft (arXiv 2602.06036) and export it to OUTPUT/draft.

    Settings, weakest first: the defaults, the recipe of the target's preset, --config, flags, --set.

    A target hosted here (--model) takes the settings of `specd start --model` under `target`: backend, dtype,
    load_format, … It runs on the trainer's device unless target.device names another.
    """
    from specd.train.interrupt import Interrupt

    flags = {
        "output": output or None,
        "target": {"exact": exact},
        "subscriber": {"endpoints": endpoint or None, "transport": transport or None, "depth": depth},
        "data": {"path": data or None},
        "train": {"max_steps": max_steps, "device": device or None},
    }
    asked = merge(merge(load_yaml(config) if config else {}, _given(flags)), overrides(settings or []))
    if model and endpoint:
        raise ConfigError(f"--model {model} hosts the target here, --endpoint {endpoint[0]} uses a daemon: give one")
    try:
        with Interrupt() as interrupt:
            _train(asked, model, resume, interrupt)
    except KeyboardInterrupt:
        typer.echo(f"specd: interrupted; {_remedy(convert(asked, RunConfig, 'settings').output)}", err=True)
        raise typer.Exit(130) from None


def _train(asked: dict[str, Any], model: str, resume: bool, interrupt: Interrupt) -> None:
    """Connect, prepare, train, export."""
    import torch

    from specd.client.subscriber import Subscriber
    from specd.data.batching import Loader
    from specd.data.dataset import prepare
    from specd.drafts.dflash.objective import DFlash, capture_spec
    from specd.train.checkpoint import Checkpoints
    from specd.train.directory import RunDirectory, identity, target_files, write_facts
    from specd.train.display import Display
    from specd.train.journal import read
    from specd.train.loop import train
    from specd.train.optimizer import total_steps
    from specd.train.tensorboard import Scalars

    first = _settle(asked, model)  # what a daemon hosts, and its preset, is known when it is connected
    if first.target and not model:
        raise ConfigError(
            f"settings: target={first.target}: expected none, as a daemon's target is configured by `specd start`; "
            f"leave them out, or give --model NAME to host the target here"
        )
    hosted = _hosted(first, model) if model else None
    device = _device(first.train.device)
    directory = RunDirectory(Path(first.output))
    directory.open(resume)
    with contextlib.ExitStack() as stack:
        link, context = first.subscriber, None
        if hosted is not None:
            from specd.daemon.serve import embedded

            host = stack.enter_context(embedded(hosted))
            link = replace(link, endpoints=(host.endpoint,), transport="inproc")
            context = host.context
        subscriber = stack.enter_context(
            Subscriber(
                link,
                lambda contract: capture_spec(_settle(asked, contract.model).draft, contract),
                device=device,
                name=directory.path.name,
                context=context,
            )
        )
        contract = subscriber.contract
        config = _with_dtype(_settle(asked, contract.model), device)
        resume = resume and directory.has_checkpoint(config.train.save_every)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        with tempfile.TemporaryDirectory(prefix="specd-target-") as scratch:
            files = target_files(contract, subscriber.artifact, Path(scratch))
            dataset = prepare(config.data, Path(scratch))
        loader = Loader(dataset, dataset.plan(config.data, config.train.seed), epochs=config.train.epochs)
        embedding = subscriber.tensor("embedding")
        tied = contract.artifacts["lm_head"].same_as == "embedding"
        objective = DFlash(
            config.draft,
            contract,
            json.loads(files["config.json"]),
            embedding,
            embedding if tied else subscriber.tensor("lm_head"),
            _mask_token(config, contract.model),
            device,
            getattr(torch, config.train.dtype),
            config.train.seed,
        )
        checkpoints = Checkpoints(directory.checkpoints, identity(config, contract, dataset.digest), config.train.keep)
        steps, done = total_steps(config.train, loader.num_batches), checkpoints.step() if resume else 0
        facts = _facts(config, contract, dataset, objective, subscriber.stats().transports)
        if not resume:
            write_facts(directory.path, facts)
        title = f"dflash draft for {contract.model} → {directory.path}"
        display = stack.enter_context(Display(title, done, steps, lambda: subscriber.stats().transports))
        stack.enter_context(_logs_above_panel())
        scalars = stack.enter_context(Scalars(directory.tensorboard, done))
        train(
            config.train,
            objective,
            loader,
            subscriber,
            checkpoints,
            directory.journal,
            sinks=(display, scalars),
            interrupt=interrupt,
            resume=resume,
        )
        with interrupt.shield():
            objective.export(directory.draft, files={n: data for n, data in files.items() if n != "config.json"})
    records = read(directory.journal)
    typer.echo(f"{len(records)} steps trained; draft in {directory.draft}")
    typer.echo(f"next: specd eval --draft {directory.draft} --untrained, then specd report {directory.path}")


def _settle(asked: dict[str, Any], model: str) -> RunConfig:
    """The run's settings once the target is known: its preset's recipe lies under what was asked for."""
    recipe = preset(model)
    return convert(merge(recipe.run, asked) if recipe else asked, RunConfig, "settings")


def _hosted(config: RunConfig, model: str) -> DaemonConfig:
    """The daemon for `model` on threads of this process: its target as asked for, its ring sized for this run.

    Raises ConfigError that names the key at fault.
    """
    from specd.cli.settings import daemon_config

    if (other := config.target.get("model", model)) != model:
        raise ConfigError(f"settings: target.model={other!r}: expected {model!r}, as given by --model; leave it out")
    settings = {
        "target": {"device": config.train.device} | config.target | {"model": model},
        "capture": {"num_taps": config.draft.num_taps},
        "ring": {"slots": config.subscriber.depth + 2, "slot_tokens": config.data.batch_tokens, "max_sessions": 1},
    }
    return daemon_config({}, settings, [], "settings")


def _remedy(output: str) -> str:
    """How to go on with a run that was interrupted."""
    from specd.train.directory import RunDirectory

    if RunDirectory(Path(output)).begun:
        return f"continue with the same command and --resume (output {output})"
    return "nothing was trained yet: give the same command again"


def _device(asked: str) -> str:
    """`auto` as a GPU where there is one, else cpu. Raises ConfigError for a device that this process lacks."""
    import torch

    from specd.memory import cuda

    device = ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked
    if device != "cpu":
        try:
            cuda.ordinal(device)
        except TransportError as error:
            raise ConfigError(f"train.device: {error}; use auto, cpu or cuda:N") from None
    return device


def _with_dtype(config: RunConfig, device: str) -> RunConfig:
    """`config` with a dtype for `auto`: bfloat16 on a GPU and float32 on a CPU, where bfloat16 is emulated."""
    if config.train.dtype != "auto":
        return config
    dtype: Literal["float32", "bfloat16"] = "float32" if device == "cpu" else "bfloat16"
    return replace(config, train=replace(config.train, dtype=dtype))


def _mask_token(config: RunConfig, model: str) -> int:
    recipe = preset(model)
    token = config.draft.mask_token_id if config.draft.mask_token_id >= 0 or not recipe else recipe.mask_token_id
    if token < 0:
        raise ConfigError(
            f"no mask token is known for target {model!r}: "
            f"give --set draft.mask_token_id=ID, the id of a token that it never writes"
        )
    return token


def _facts(
    config: RunConfig, contract: TargetContract, dataset: Dataset, objective: DFlash, transports: dict[str, str]
) -> RunFacts:
    from specd.train.directory import RunFacts, machine_facts

    shape, report = objective.draft.shape, dataset.report
    parameters = sum(parameter.numel() for parameter in objective.module.parameters())
    return RunFacts(
        started=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        target={
            "model": contract.model,
            "layers": contract.num_layers,
            "hidden size": contract.hidden_size,
            "vocabulary": contract.vocab_size,
            "dtype": contract.dtype,
            "fingerprint": contract.fingerprint,
        },
        draft={
            "method": "DFlash (arXiv 2602.06036)",
            "layers": shape.num_layers,
            "trained parameters": f"{parameters:,}",
            "taps": ", ".join(map(str, shape.taps)),
            "block size": shape.block_size,
            "computes in": str(objective.embedding.dtype).removeprefix("torch."),
        },
        data={
            "path": config.data.path,
            "samples": f"{report.samples:,}",
            "tokens": f"{report.tokens:,}",
            "trainable tokens": f"{report.trainable_tokens:,}",
            "cut to max_length": report.cut,
            "left out, without labels": report.without_labels,
            "digest": dataset.digest,
        },
        transports=transports,
        machine=machine_facts(),
        config=msgspec.to_builtins(config),
    )


@contextlib.contextmanager
def _logs_above_panel() -> Iterator[None]:
    """While a live panel is up, log lines go through the stream it has put in place of stderr, and scroll above it."""
    handlers = [one for one in logging.getLogger("specd").handlers if isinstance(one, logging.StreamHandler)]
    streams = [(handler, handler.stream) for handler in handlers if handler.stream is sys.__stderr__]
    for handler, _ in streams:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler, stream in streams:
            handler.setStream(stream)


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {
        key: inner
        for key, value in flags.items()
        if (inner := _given(value) if isinstance(value, dict) else value) not in (None, {})
    }
