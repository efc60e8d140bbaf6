"""`specd bench`: one question a verb, a table on the terminal or JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from specd.config.load import overrides
from specd.drafts import registry
from specd.errors import ConfigError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

log = logging.getLogger(__name__)

app = typer.Typer(help="Measure what this machine gives, one question a verb.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Measure what this machine gives, one question a verb."""


@app.command(
    epilog="Examples: `specd bench transport` · `specd bench transport --transports cuda_ipc,nccl --devices peer "
    "--sizes 16M,1G --chart transports.png`"
)
def transport(
    transports: Annotated[str, typer.Option(help="Transports, comma-separated; empty for all.")] = "",
    devices: Annotated[
        str, typer.Option(help="Daemon and trainer on the cpu, the same GPU, or peer GPUs; all that are here.")
    ] = "all",
    sizes: Annotated[str, typer.Option(help="Bytes of a slot, comma-separated, with K, M or G.")] = "",
    iterations: Annotated[int, typer.Option(min=0, help="Transfers a row; 0 for as many as the time allows.")] = 0,
    budget_s: Annotated[float, typer.Option(min=1, help="Seconds for the whole run, or a little more.")] = 150.0,
    chart: Annotated[Path | None, typer.Option(help="Draw the result in FILE.png or FILE.svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How fast does each transport move a slot, next to a raw copy of the same size, and which one would auto take?"""
    from rich.console import Console

    from specd.bench import charts
    from specd.bench.transport.chart import write
    from specd.bench.transport.run import complain, run
    from specd.bench.transport.table import render

    if chart is not None:
        charts.check(chart)
    wanted = [_bytes(size) for size in _names(sizes)]
    with Console(stderr=True).status("") as status:
        result = run(
            transports=_names(transports),
            sizes=wanted,
            iterations=iterations,
            devices=devices,
            budget_s=budget_s,
            progress=status.update,
        )
    if as_json:
        typer.echo(_json(result))
    else:
        Console().print(*render(result), sep="\n")
    if chart is not None:
        write(result, chart)
        typer.echo(f"chart: {chart}", err=True)
    complain(result, _names(transports))


@app.command(epilog="Examples: `specd bench daemon` · `specd bench daemon --json`")
def daemon(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """What does a daemon add to a batch, and how well do target and trainer overlap?"""
    from specd.bench.daemon import run

    logging.getLogger("specd").setLevel(logging.WARNING)  # sessions come and go all the time here
    result = run()
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        for title, rows in result.items():
            _table(title, rows)


@app.command(
    epilog="Examples: `specd bench pipeline --quick` · `specd bench pipeline --json --chart pipeline.png > "
    "pipeline.json`, then `specd plan --from pipeline.json` · `specd bench pipeline --model Qwen3-4B --daemons 2 "
    "--trainers 6`"
)
def pipeline(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Target, with dummy weights; empty for what this machine can run.")
    ] = "",
    draft: Annotated[str, typer.Option(help="A method, of the target's shape, or synthetic:ms=20.")] = registry.DEFAULT,
    daemons: Annotated[int, typer.Option(help="Daemons that feed the trainers, a GPU each.")] = 1,
    trainers: Annotated[
        int, typer.Option(help="Ranks of one data-parallel training, a GPU each; one alone is timed too.")
    ] = 1,
    transports: Annotated[
        str, typer.Option(help="Comma-separated, the first in full; empty for cuda_ipc, shm on the CPU.")
    ] = "",
    depths: Annotated[str, typer.Option(help="Batches under way, comma-separated.")] = "",
    lengths: Annotated[str, typer.Option(help="fixed, log-normal or both, comma-separated.")] = "",
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a trainer's batch.")] = None,
    sample_tokens: Annotated[int | None, typer.Option(help="Tokens of a sample of fixed length.")] = None,
    steps: Annotated[int | None, typer.Option(help="Iterations timed in each row.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Of the target or the draft, e.g. --set target.tp=2.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny shapes on the CPU, to see that it works.")] = False,
    chart: Annotated[Path | None, typer.Option(help="Draw the result in FILE.png or FILE.svg.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep the JSON in FILE, written anew after each row: nothing measured is lost.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How close does a pipeline come to its bound, next to co-location and to origin (SpecForge's pull request 569)?"""
    from rich.console import Console

    from specd.bench import charts, outputs
    from specd.bench.pipeline.chart import write
    from specd.bench.pipeline.defaults import defaults
    from specd.bench.pipeline.run import run
    from specd.bench.pipeline.table import render

    if chart is not None:
        charts.check(chart)
    if save is not None:
        outputs.check("--save", save)
    logging.getLogger("specd").setLevel(logging.WARNING)  # sessions come and go all the time here
    given = {
        "draft": draft,
        "transports": _names(transports),
        "depths": [_whole(depth, "--depths") for depth in _names(depths)],
        "lengths": _names(lengths),
        "batch_tokens": batch_tokens,
        "sample_tokens": sample_tokens,
        "steps": steps,
    }
    asked: dict[str, Any] = {name: value for name, value in given.items() if value not in (None, [])}
    known = {"target": "target", "draft": "draft_config"}
    for section, values in overrides(settings or []).items():
        if section not in known or not isinstance(values, dict):
            raise ConfigError(f"--set {section}: expected target.KEY=VALUE or draft.KEY=VALUE")
        asked |= {known[section]: values}

    with _ended_by_signal(), Console(stderr=True).status("") as status:
        result = run(defaults(quick, daemons, model, asked, trainers), status.update, _keeper(save))
    if as_json:
        typer.echo(_json(result))
    else:
        Console().print(*render(result), sep="\n")
    if chart is not None:
        write(result, chart)
        typer.echo(f"chart: {chart}", err=True)


@app.command(
    epilog="Examples: `specd bench draft` · `specd bench draft --method dflash2 --set draft.block_size=16 --json`"
)
def draft(
    method: Annotated[
        str, typer.Option("--method", help=f"Which draft: {', '.join(registry.BUILTIN)}, or a plug-in's.")
    ] = registry.DEFAULT,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps timed.")] = None,
    context: Annotated[str, typer.Option(help="Context tokens of a batch, comma-separated.")] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Of the draft, e.g. --set draft.block_size=8.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How fast is a training step of a draft, next to the matmuls this device can do?"""
    from rich.console import Console

    from specd.bench.draft import Variant, defaults_of, render, run

    asked: dict[str, Any] = {"name": method} | ({} if steps is None else {"steps": steps})
    given = overrides(settings or [])
    if given.keys() - {"draft"} or not isinstance(given.get("draft", {}), dict):
        raise ConfigError(f"--set {', '.join(settings or [])}: expected draft.KEY=VALUE")
    if own := given.get("draft"):
        asked["variants"] = {", ".join(settings or []): Variant(defaults_of(method) | own)}
    if contexts := [_whole(tokens, "--context") for tokens in _names(context)]:
        asked["context"] = contexts
    result = run(**asked)
    if as_json:
        typer.echo(_json(result))
    else:
        Console().print(render(result))


@app.command(
    epilog="Examples: `specd bench target --json --save target.json` · `specd bench target --set "
    "target.attention_backend=triton --beside target.tp=2 --sizes 1024,8192`"
)
def target(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Target, with dummy weights; empty for what this machine can run.")
    ] = "",
    sizes: Annotated[str, typer.Option(help="Tokens of a sample, comma-separated.")] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Of the target, e.g. --set target.attention_backend=triton.")
    ] = None,
    beside: Annotated[
        list[str] | None, typer.Option("--beside", help="Settings of a second bare target, e.g. target.tp=2.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over all rows: the spread is between them.")] = 3,
    forwards: Annotated[int, typer.Option(min=2, help="Forwards timed in a row and round.")] = 10,
    limit_s: Annotated[float, typer.Option(min=1, help="No round begins after so many seconds.")] = 240.0,
    save: Annotated[Path | None, typer.Option(help="Keep the JSON in FILE, written anew after each round.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How fast is a target by the size of its forwards, one sample or merged, alone and behind a daemon?"""
    from rich.console import Console

    from specd.bench import outputs
    from specd.bench.target.run import SIZES, Plan, run, settings_for
    from specd.bench.target.table import render

    if save is not None:
        outputs.check("--save", save)
    logging.getLogger("specd").setLevel(logging.WARNING)  # sessions come and go all the time here
    plan = Plan(
        sizes=tuple(sorted({_whole(size, "--sizes") for size in _names(sizes)})) or SIZES,
        beside=_of_target(beside or [], "--beside"),
        rounds=rounds,
        forwards=forwards,
        limit_s=limit_s,
    )
    asked = settings_for(model, plan, _of_target(settings or [], "--set"))
    with _ended_by_signal(), Console(stderr=True).status("") as status:
        result = run(asked, plan, status.update, _keeper(save))
    _keeper(save)(result)
    if as_json:
        typer.echo(_json(result))
    else:
        Console().print(*render(result), sep="\n")


@app.command(
    epilog="Examples: `specd bench replay /nvme/bench --gb 40 --ram-gb 8` · `specd bench replay /nvme/bench --gb 40 "
    "--model Qwen3-30B-A3B-FP8 --rounds 20 --json`"
)
def replay(
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="On the disk to measure; new.")] = None,
    gb: Annotated[float, typer.Option(min=0, help="How much of the disk, in GB.")] = 0.0,
    ram_gb: Annotated[float, typer.Option(min=0, help="How much memory, in GB.")] = 0.0,
    device: Annotated[str, typer.Option(help="Where the ring is: auto, cpu or cuda:N.")] = "auto",
    slot: Annotated[str, typer.Option(help="Bytes of a slot, with K, M or G.")] = "60M",
    asked: Annotated[float, typer.Option(min=0.001, help="GB/s at which slots come that are to be kept.")] = 1.8,
    model: Annotated[str, typer.Option("--model", "-m", help="A target to keep states of, with dummy weights.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Of a batch of that target.")] = 3072,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds, each with states kept and not.")] = 20,
    count: Annotated[int, typer.Option(min=8, help="Batches of half a round.")] = 40,
    step_ms: Annotated[float, typer.Option(min=0, help="How long a trainer is busy with a batch.")] = 0.0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Of the target, e.g. --set target.max_forward_tokens=8192.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Keep the JSON in FILE, written anew after each part.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How fast are states kept and read again, and what does keeping them cost a daemon's trainers?"""
    from rich.console import Console

    from specd.bench import outputs
    from specd.bench.replay.run import render, run

    if save is not None:
        outputs.check("--save", save)
    logging.getLogger("specd").setLevel(logging.WARNING)  # sessions come and go all the time here
    with _ended_by_signal(), Console(stderr=True).status("") as status:
        result = run(
            directory,
            gb=gb,
            ram_gb=ram_gb,
            device=device,
            slot_bytes=_bytes(slot),
            asked=asked,
            model=model,
            tokens=tokens,
            target=_of_target(settings or [], "--set"),
            rounds=rounds,
            count=count,
            step_ms=step_ms,
            progress=status.update,
            keep=_keeper(save),
        )
    if as_json:
        typer.echo(_json(result))
    else:
        Console().print(*render(result), sep="\n")


def _of_target(settings: Sequence[str], option: str) -> dict[str, Any]:
    """What these settings say of the target. Raises ConfigError for others."""
    found = overrides(settings)
    if found.keys() - {"target"} or not isinstance(found.get("target", {}), dict):
        raise ConfigError(f"{option} {', '.join(settings)}: expected target.KEY=VALUE")
    return dict(found.get("target", {}))


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM is an interrupt meanwhile: what a benchmark started is to end with it, however it is ended."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _keeper(save: Path | None) -> Callable[[msgspec.Struct], None]:
    """What writes a result to the file of `--save`, if there is one."""
    from specd.bench import outputs

    def keep(result: msgspec.Struct) -> None:
        if save is None:
            return
        try:
            outputs.write(save, _json(result).encode())
        except OSError as error:  # the run is worth more than its file
            log.warning("--save %s: not written this time: %s", save, error.strerror)

    return keep


def _whole(text: str, option: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{option} {text!r}: expected whole numbers, comma-separated")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _bytes(text: str) -> int:
    """`64M` as a number of bytes. Raises ConfigError for anything but digits and one of K, M, G."""
    digits, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    if not digits.isdecimal() or unit not in UNITS or int(digits) == 0:
        raise ConfigError(f"size {text!r}: expected a number of bytes, with K, M or G if wanted, for example 64M")
    return int(digits) * UNITS[unit]


def _json(result: msgspec.Struct) -> str:
    return msgspec.json.format(msgspec.json.encode(result), indent=2).decode()


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)
