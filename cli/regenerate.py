"""`specd data regenerate`: answers of the target in place of those that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specd.cli.settings import Data, DataSettings, Files, Model, Prompts, data_config, named, needed
from specd.errors import ConfigError

EXAMPLES = (
    "Example: `specd data regenerate chats.jsonl --model smollm2-135m --output answers.jsonl --max-new-tokens 256`"
)


def regenerate(
    output: Annotated[Path, typer.Option("--output", "--out", "-o", help="The JSONL file to write.")],
    files: Files = None,
    data: Data = None,
    prompts: Prompts = None,
    model: Model = "",
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations answered together.")] = 16,
    max_samples: Annotated[int, typer.Option(min=0, help="Only the first N conversations, 0 for all.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads, 0 for torch's choice.")] = 0,
    settings: DataSettings = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")] = False,
) -> None:
    """Regenerate every answer of the conversations with the target: greedily, from the prompts alone.

    A draft learns to predict its target, so it should learn from what the target writes. Give an interrupted command
    again to resume it.
    """
    config = data_config(named(files, data, prompts), needed(model), settings)
    if output.exists() and not overwrite:
        raise ConfigError(f"{str(output)!r} exists already; give --overwrite to replace it, or another --output")

    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from specd.data import regenerate as regeneration
    from specd.targets.transformers.load import load_causal_lm

    if threads:
        torch.set_num_threads(threads)
    network, tokenizer = load_causal_lm(model, dtype=dtype, device=device)
    if tokenizer is None:
        raise ConfigError(f"model {model!r} has no tokenizer, so it cannot answer text; add its tokenizer files")
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, rate="")

        def show(progress: regeneration.Progress) -> None:
            rate = f"{progress.tokens / max(progress.seconds, 1e-9):.0f} tokens/s"
            bar.update(task, completed=progress.samples, total=progress.total, rate=rate)

        try:
            done = regeneration.regenerate(
                network,
                tokenizer,
                str(config.path),
                output,
                target=model,
                split=split,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                limit=max_samples,
                template=config.template,
                overwrite=overwrite,
                on_batch=show,
            )
        except KeyboardInterrupt:
            bar.stop()
            typer.echo("specd: interrupted; give the same command again to resume", err=True)
            raise typer.Exit(130) from None
    rate = f"{done.tokens / max(done.seconds, 1e-9):.0f} tokens/s"
    typer.echo(f"{output}: {done.samples} answered, {done.tokens} tokens now in {done.seconds:.1f} s ({rate})")
