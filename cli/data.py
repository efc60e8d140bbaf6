"""`specd data`: regenerate answers with the target, show a sample and its labels, count a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from specd.cli.settings import data_config
from specd.config.settings import DataConfig
from specd.drafts import registry
from specd.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from specd.data.dataset import Dataset

EXAMPLES = (
    "Examples: `specd data stats chats.jsonl --model Qwen3-8B` · `specd data show chats.jsonl --row 3 --model Qwen3-8B`"
)
BARS = 12
BAR_WIDTH = 40

Model = Annotated[str, typer.Option("--model", "-m", help="The target: preset, local directory or hub name.")]
Source = Annotated[
    str,
    typer.Argument(
        help="JSONL, JSON, Parquet or hub name; else the recipe's, or what comes with specd.", show_default=False
    ),
]
Preset = Annotated[str, typer.Option("--preset", help="Take this preset's recipe; else the target's own.")]
Method = Annotated[str, typer.Option("--method", help="The draft whose training the samples are for.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting of the data section, as data.max_length=512.")
]

app = typer.Typer(help="Make, show and count training data.\n\n" + EXAMPLES, no_args_is_help=True)


@app.command(
    epilog="Example: `specd data regenerate --model smollm2-135m --prompts chats.jsonl --output answers.jsonl "
    "--max-new-tokens 256`"
)
def regenerate(
    output: Annotated[Path, typer.Option("--output", "--out", "-o", help="The JSONL file to write.")],
    model: Model = "smollm2-135m",
    prompts: Annotated[
        str,
        typer.Option(
            "--prompts", "-p", help="JSONL, JSON, Parquet or hub name; else the recipe's, or what comes with specd."
        ),
    ] = "",
    split: Annotated[str, typer.Option(help="Split of a hub data set.")] = "train",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Conversations answered together.")] = 16,
    max_samples: Annotated[int, typer.Option(min=0, help="Only the first N conversations, 0 for all.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads, 0 for torch's choice.")] = 0,
    settings: Settings = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output file.")] = False,
) -> None:
    """Regenerate every answer of the conversations with the target: greedily, from the prompts alone.

    A draft learns to predict its target, so it should learn from what the target writes. Give an interrupted command
    again to resume it.
    """
    config = data_config(prompts, model, settings)
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


@app.command(epilog="Example: `specd data show chats.jsonl --row 3 --model Qwen3-8B --set data.last_turn_only=true`")
def show(
    source: Source = "",
    model: Model = "smollm2-135m",
    row: Annotated[int, typer.Option("--row", "-n", min=1, help="Which row of the file, from 1.")] = 1,
    method: Method = registry.DEFAULT,
    preset: Preset = "",
    settings: Settings = None,
) -> None:
    """Show one sample as the target reads it, with the tokens that are labels in colour."""
    from rich.console import Console
    from rich.text import Text

    from specd.data.dataset import sample, trainable
    from specd.data.tokenizer import load_tokenizer

    config = data_config(source, model, settings, method=method, preset=preset)
    needed = registry.load(method).consecutive_labels
    directory = _tokenizer_dir(model)
    tokens, mask = sample(config, directory, row)
    tokenizer = load_tokenizer(directory)
    text = Text()
    begin = 0
    for end in range(1, tokens.size + 1):
        if end == tokens.size or mask[end] != mask[begin] or end == config.max_length:
            style = "strike dim red" if begin >= config.max_length else "bold green" if mask[begin] else "dim"
            text.append(str(tokenizer.decode(tokens[begin:end].tolist(), skip_special_tokens=False)), style)
            begin = end
    kept = mask[: config.max_length]
    console = Console(highlight=False)
    console.rule(f"{config.path} row {row}", align="left")
    console.print(text, soft_wrap=True)
    console.rule()
    legend = Text.assemble(("label", "bold green"), " (the target writes it), ", ("context", "dim"), " (given)")
    if tokens.size > config.max_length:
        legend.append(f", {tokens.size - config.max_length} tokens cut", "strike dim red")
    console.print(legend)
    console.print(f"{kept.size} tokens, {int(kept.sum())} labels")
    if not trainable(kept, needed):
        console.print(f"[bold red]left out of training:[/] {method} needs {needed} labels in a row")


@app.command(epilog="Example: `specd data stats chats.jsonl --model Qwen3-8B --json`")
def stats(
    source: Source = "",
    model: Model = "smollm2-135m",
    method: Method = registry.DEFAULT,
    preset: Preset = "",
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count samples, tokens and labels, and show how long samples are."""
    from rich.console import Console

    from specd.data.dataset import prepare

    config = data_config(source, model, settings, method=method, preset=preset)
    needed = registry.load(method).consecutive_labels
    dataset = prepare(config, _tokenizer_dir(model), consecutive_labels=needed)
    if as_json:
        lengths = {"mean": float(dataset.lengths.mean()), "longest": int(dataset.lengths.max())}
        typer.echo(
            msgspec.json.encode({"digest": dataset.digest, "length": lengths, "report": dataset.report}).decode()
        )
    else:
        _show_stats(Console(highlight=False), config, dataset, f"{method} needs {needed} labels in a row")


def _show_stats(console: Console, config: DataConfig, dataset: Dataset, rule: str) -> None:
    import numpy as np
    from rich.table import Table

    report, lengths = dataset.report, dataset.lengths
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(justify="right")
    facts.add_column(style="dim")
    for name, count, note in (
        ("rows", report.rows, str(config.path)),
        ("samples", report.samples, ""),
        ("left out", report.without_labels, rule),
        ("cut", report.cut, f"to {config.max_length} tokens"),
        ("tokens", report.tokens, f"{lengths.mean():.1f} a sample, {np.median(lengths):.0f} median"),
        ("labels", report.trainable_tokens, f"{report.trainable_tokens / report.tokens:.1%} of all tokens"),
        *((f"form {form}", count, "samples") for form, count in sorted(report.forms.items())),
    ):
        facts.add_row(name, f"{count:,}", note)
    console.print(facts)
    counts, edges = np.histogram(lengths, bins=min(BARS, int(np.ptp(lengths)) + 1))
    bars = Table(title="length of samples in tokens", box=None, title_justify="left", pad_edge=False)
    for heading in ("from", "to", "samples"):
        bars.add_column(heading, justify="right")
    bars.add_column("")
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        bar = "█" * max(round(BAR_WIDTH * count / counts.max()), int(count > 0))
        bars.add_row(f"{low:.0f}", f"{high:.0f}", f"{count:,}", f"[green]{bar}[/]")
    console.print()
    console.print(bars)


def _tokenizer_dir(model: str) -> Path:
    from specd.targets.source import resolve

    path = resolve(model, need="tokenizer").path
    assert path is not None, "only a shape can come without a directory"
    return path
