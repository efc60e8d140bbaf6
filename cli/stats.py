"""`specd data stats`: how many samples, tokens and labels a data set has, and what is left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from specd.cli.settings import (
    Data,
    DataSettings,
    Files,
    Method,
    Model,
    Preset,
    data_config,
    named,
    needed,
    tokenizer_dir,
)
from specd.config.settings import DataConfig
from specd.data.rows import sources
from specd.drafts import registry

if TYPE_CHECKING:
    from rich.console import Console

    from specd.data.dataset import Dataset

EXAMPLES = (
    "Examples: `specd data stats chats.jsonl --model Qwen3-8B` · `specd data stats a.jsonl b.jsonl -m Qwen3-8B --json`"
)
BARS = 12
BAR_WIDTH = 40


def stats(
    files: Files = None,
    data: Data = None,
    model: Model = "",
    method: Method = registry.DEFAULT,
    preset: Preset = "",
    settings: DataSettings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count samples, tokens and labels, what is left out and why, and show how long samples are."""
    from rich.console import Console

    from specd.data.dataset import prepare
    from specd.data.progress import progress

    config = data_config(named(files, data), needed(model), settings, method=method, preset=preset)
    labels = registry.load(method).consecutive_labels
    directory = tokenizer_dir(model)
    with progress("reading") as on_rows:
        dataset = prepare(config, directory, consecutive_labels=labels, on_rows=on_rows)
    if as_json:
        lengths = {"mean": float(dataset.lengths.mean()), "longest": int(dataset.lengths.max())}
        found = {"data": config.path, "digest": dataset.digest, "length": lengths, "report": dataset.report}
        typer.echo(msgspec.json.encode(found).decode())
        return
    console = Console(highlight=False, markup=False, emoji=False)
    _show_counts(console, config, dataset, f"{method} needs {labels} labels in a row")
    _show_lengths(console, dataset)


def _show_counts(console: Console, config: DataConfig, dataset: Dataset, rule: str) -> None:
    from rich.table import Table

    from specd.cli.page import visible

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(justify="right")
    facts.add_column(style="dim", overflow="fold")
    for name, count, note in _counts(config, dataset, rule):
        facts.add_row(visible(name, console.encoding), f"{count:,}", visible(note, console.encoding))
    console.print(facts)
    for fault in dataset.report.bad:
        console.print(visible(f"unusable: {fault}", console.encoding), soft_wrap=True)


def _counts(config: DataConfig, dataset: Dataset, rule: str) -> list[tuple[str, int, str]]:
    """Names and counts, each with what it is of or how it comes about."""
    import numpy as np

    report, lengths, read = dataset.report, dataset.lengths, sources(config)
    each = [
        (f"from {number}", samples, f"{source}" if source.weight == 1 else f"{source}, weight {source.weight:g}")
        for number, (source, samples) in enumerate(zip(read, report.sources, strict=False), start=1)
    ]
    seldom = [
        ("unusable", report.num_bad, "left out, as data.bad_rows says"),
        ("split", report.split, "samples more, of long documents"),
        ("dropped", report.dropped, "answers of which the chat template leaves out a part"),
    ]
    return [
        ("rows", report.rows, str(read[0]) if len(read) == 1 else f"of {len(read)} sources"),
        ("samples", report.samples, ""),
        *(each if len(read) > 1 else ()),
        ("left out", report.without_labels, rule),
        ("cut", report.cut, f"to {config.max_length} tokens"),
        *((name, count, note) for name, count, note in seldom if count),
        ("tokens", report.tokens, f"{lengths.mean():.1f} a sample, {np.median(lengths):.0f} median"),
        ("labels", report.trainable_tokens, f"{report.trainable_tokens / report.tokens:.1%} of all tokens"),
        *((f"form {form}", count, "samples") for form, count in sorted(report.forms.items())),
    ]


def _show_lengths(console: Console, dataset: Dataset) -> None:
    import numpy as np
    from rich.table import Table
    from rich.text import Text

    block = "█" if console.encoding.startswith("utf") else "#"
    counts, edges = np.histogram(dataset.lengths, bins=min(BARS, int(np.ptp(dataset.lengths)) + 1))
    bars = Table(title="length of samples in tokens", box=None, title_justify="left", pad_edge=False)
    for heading in ("from", "to", "samples"):
        bars.add_column(heading, justify="right")
    bars.add_column("")
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        bar = block * max(round(BAR_WIDTH * count / counts.max()), int(count > 0))
        bars.add_row(f"{low:.0f}", f"{high:.0f}", f"{count:,}", Text(bar, "green"))
    console.print()
    console.print(bars)
