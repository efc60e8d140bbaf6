"""`specd data regenerate`: every answer of a file anew, by the target itself."""

from __future__ import annotations

import os
import shlex
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from specd.cli.settings import Data, DataSettings, Files, Model, Prompts, TrustRemoteCode, data_config, named, needed
from specd.cli.training import then
from specd.config.settings import DataConfig
from specd.drafts import registry
from specd.errors import ConfigError

if TYPE_CHECKING:
    from specd.data.regenerate.job import Answerer, Progress, Sampling

EXAMPLES = (
    "Examples: `specd data regenerate chats.jsonl --model Qwen3-8B --output answers.jsonl` · `specd data regenerate "
    "chats.jsonl --model Qwen/Qwen3-8B --endpoint http://localhost:30000/v1 --output answers.jsonl`"
)
KEY = "OPENAI_API_KEY"
HERE, THERE = "In this process", "At a server (--endpoint)"


def regenerate(
    output: Annotated[Path, typer.Option("--output", "--out", "-o", help="The JSONL file to write.")],
    files: Files = None,
    data: Data = None,
    prompts: Prompts = None,
    model: Model = "",
    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint",
            help=f"Ask a server that speaks OpenAI's API, as http://host:port/v1, for the model that it calls --model; "
            f"else the target runs in this process. An API key is read from {KEY}.",
        ),
    ] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=0, help="Longest answer, in tokens; 0 for as long as the target can.")
    ] = 0,
    temperature: Annotated[float, typer.Option(min=0, help="Sample at this temperature; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of that share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    max_samples: Annotated[int, typer.Option(min=0, help="Only the first N rows, 0 for all.")] = 0,
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "",
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel=HERE, help="Conversations answered together.")] = 16,
    device: Annotated[str, typer.Option(rich_help_panel=HERE, help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(rich_help_panel=HERE, help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, rich_help_panel=HERE, help="CPU threads, 0 for torch's choice.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    concurrency: Annotated[int, typer.Option(min=1, rich_help_panel=THERE, help="Conversations in flight.")] = 64,
    retries: Annotated[
        int, typer.Option(min=0, rich_help_panel=THERE, help="How often a failed request is repeated.")
    ] = 6,
    timeout: Annotated[
        float, typer.Option(min=0.1, rich_help_panel=THERE, help="Seconds until an answer must be there.")
    ] = 1800,
    extra: Annotated[
        list[str] | None,
        typer.Option(
            "--extra", rich_help_panel=THERE, metavar="KEY=JSON", help="A field of each request, as top_k=20."
        ),
    ] = None,
    settings: DataSettings = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")] = False,
) -> None:
    """Have the target answer every turn of the conversations anew, from the prompts alone.

    A draft learns to predict its target, so it should learn from what the target writes. Give an interrupted command
    again to resume it.
    """
    config = data_config(named(files, data, prompts), needed(model), settings)
    flags: dict[str, Any] = {name: value for name, value in (("max_samples", max_samples), ("split", split)) if value}
    config = msgspec.structs.replace(config, **flags)
    if output.exists() and not overwrite:
        raise ConfigError(f"{str(output)!r} exists already; give --overwrite to replace it, or another --output")

    if not top_p:
        raise ConfigError("--top-p 0: expected more than 0, at most 1; greedy answers are --temperature 0, the default")

    from specd.data.regenerate.job import Sampling

    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if endpoint:
        from specd.data.regenerate.server import Server

        answerer: Answerer = Server(
            endpoint,
            model,
            sampling,
            template=config.template,
            extra=_extra(extra or []),
            key=os.environ.get(KEY, "").strip(),
            concurrency=concurrency,
            retries=retries,
            timeout_s=timeout,
        )
    elif extra:
        raise ConfigError(f"--extra {extra[0]!r} is a field for a server; give --endpoint, or leave it out")
    else:
        from specd.data.regenerate.log import settings_of

        # A day that the template is told is that of the first call, also when a later one resumes it.
        day = config.date or settings_of(output).get("date") or date.today().isoformat()
        config = msgspec.structs.replace(config, date=day)
        answerer = _local(model, sampling, config, batch_size, device, dtype, threads, trust_remote_code)
    _run(config, answerer, model, output, overwrite)


def _local(
    model: str,
    sampling: Sampling,
    config: DataConfig,
    batch_size: int,
    device: str,
    dtype: str,
    threads: int,
    trust_remote_code: bool,
) -> Answerer:
    import torch

    from specd.data.regenerate.local import Local
    from specd.targets.transformers.load import load_causal_lm

    if threads:
        torch.set_num_threads(threads)
    network, tokenizer = load_causal_lm(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if tokenizer is None:
        raise ConfigError(f"model {model!r} has no tokenizer, so it cannot answer text; add its tokenizer files")
    options: dict[str, Any] = {"template": config.template, "date": config.date}
    return Local(network, tokenizer, sampling, target=model, batch_size=batch_size, **options)


def _run(config: DataConfig, answerer: Answerer, model: str, output: Path, overwrite: bool) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from specd.data.regenerate import job

    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, rate="")

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.samples, total=progress.total, rate=_rate(progress))

        try:
            done = job.regenerate(config, answerer, output, overwrite=overwrite, on_answer=show)
        except KeyboardInterrupt:
            bar.stop()
            typer.echo("specd: interrupted; give the same command again to resume", err=True)
            raise typer.Exit(130) from None
    typer.echo(
        f"{output}: {done.samples:,} answered, {done.tokens:,} tokens now in {done.seconds:.1f} s ({_rate(done)})"
    )
    if done.shortened:
        typer.echo(f"{done.shortened:,} of them end before their last question, which did not fit")
    for fault in done.left_out:
        typer.echo(f"{fault.rows:,} left out, {fault.kind}, the first: {fault.first}")
    data, target = shlex.quote(str(output)), shlex.quote(model)
    then(
        f"specd data show {data} --model {target}",
        f"specd train {registry.DEFAULT} --model {target} --data {data} --output runs/first",
    )


def _rate(progress: Progress) -> str:
    return f"{progress.tokens / max(progress.seconds, 1e-9):,.0f} tokens/s"


def _extra(texts: list[str]) -> dict[str, Any]:
    """Fields of a request, as KEY=JSON each. Raises ConfigError."""
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            if not (name and equals):
                raise ValueError("no key and value")
            found[name] = msgspec.json.decode(value)
        except ValueError as error:
            raise ConfigError(
                f"--extra {text!r}: expected KEY=JSON, as top_k=20 or stop='[\"END\"]' ({error})"
            ) from None
    return found
