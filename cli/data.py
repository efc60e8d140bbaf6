"""`specd data`: regenerate answers with the target, show a sample and its labels, count a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from specd.cli import regenerate
from specd.cli.settings import data_config
from specd.config.settings import DataConfig
from specd.drafts import registry

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
app.command("regenerate", epilog=regenerate.EXAMPLES)(regenerate.regenerate)


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
