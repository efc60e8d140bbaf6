"""`specd eval`: greedy speculative decoding with a draft, and the proof that it changes no output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specd.cli.settings import data_config
from specd.data.rows import HELDOUT
from specd.drafts import registry
from specd.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from specd.evaluate.results import EvalFacts

EXAMPLES = (
    f"Examples: `specd eval --draft runs/{registry.DEFAULT}` · "
    "`specd eval --model smollm2-135m --draft runs/first/draft --untrained --limit 8`"
)


def evaluate(
    draft: Annotated[Path, typer.Option("--draft", "-d", help="Draft directory, or the run that exported it.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="The draft's target; by default the one the run was trained on.")
    ] = "",
    prompts: Annotated[
        str, typer.Option(help="Conversations (JSONL, Parquet, hub name); each first question is asked.")
    ] = HELDOUT,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    limit: Annotated[int, typer.Option(min=0, help="Use at most N prompts, 0 for all.")] = 0,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Also decode with the draft as it was before training, to compare.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 (shows identity best), bfloat16 or float16.")] = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the chat template, as data.template.enable_thinking=false."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    """Decode prompts with a draft and without it: acceptance length, and whether every output is identical.

    The target runs in this process. Results also go to the draft's run directory, for `specd report`.
    The chat template gets the run's options; --set data.template.KEY=VALUE changes them, or gives them without a run.

    Exits with 1 when an output differs from the target's own greedy one, unless by a tie: two logits that are equal
    within the rounding of the target's dtype.
    """
    import msgspec
    from rich.console import Console

    from specd.drafts.directory import draft_directory
    from specd.evaluate.evaluator import evaluate_draft
    from specd.evaluate.results import EVALS
    from specd.targets.transformers.load import load_causal_lm
    from specd.train.directory import FACTS, beginning, read_facts

    directory = draft_directory(draft)
    run = directory.parent if (directory.parent / FACTS).is_file() else None
    facts = read_facts(run) if run else None
    model = model or str(facts.target.get("model", "") if facts else "")
    if not model:
        raise ConfigError(f"{directory} belongs to no run that names its target: give --model")
    used = {"template": facts.config.get("data", {}).get("template", {})} if facts else None
    if strange := [text for text in settings or [] if not text.startswith("data.template.")]:
        raise ConfigError(f"--set {strange[0]}: evaluation takes data.template.KEY=VALUE alone")
    template = data_config(prompts, model, settings, run=used).template
    registry.read(directory)  # fail before the target is loaded
    target, tokenizer = load_causal_lm(model, dtype=dtype, device=device)
    console = Console(quiet=as_json)
    began = beginning(facts) if facts and untrained else 0
    results = evaluate_draft(
        directory,
        target,
        tokenizer,
        prompts,
        name=model,
        template=template,
        limit=limit,
        max_new_tokens=max_new_tokens,
        untrained=began if untrained else None,
        progress=lambda title, total: _progress(console, title, total),
    )
    if run:
        for name, found in results.items():
            (run / EVALS[name]).write_bytes(msgspec.json.encode(found) + b"\n")
    if as_json:
        typer.echo(msgspec.json.encode(results))
    else:
        show(console, results)
    if any(result.different for result in results.values()):
        raise typer.Exit(1)


def show(console: Console, results: dict[str, EvalFacts]) -> None:
    """Print what was measured, with its definition, and the proof of identity."""
    from rich import box
    from rich.table import Table

    first = next(iter(results.values()))
    offsets = range(1, first.block_size)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("draft")
    for heading in ("acceptance length", "target forwards", "tokens", "tokens/s", "without draft"):
        table.add_column(heading, justify="right")
    accepted = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="guesses accepted at block offset", title_justify="left"
    )
    accepted.add_column("draft")
    for offset in offsets:
        accepted.add_column(str(offset), justify="right")
    for name, facts in results.items():
        result = facts.result
        table.add_row(
            name,
            f"[bold]{result.acceptance_length:.3f}[/]",
            f"{result.forwards:,}",
            f"{result.new_tokens:,}",
            f"{result.tokens_per_s:.1f}",
            f"{result.greedy_tokens_per_s:.1f}",
        )
        accepted.add_row(name, *(f"{share:.1%}" for share in result.acceptance_by_offset))
    console.print(table)
    console.print(accepted)
    console.print(first.result.definition, style="dim", highlight=False)
    for name, facts in results.items():
        verdict = f"{facts.identical} of {facts.prompts} outputs equal the target's own greedy output, token for token"
        if facts.ties:
            finer = " (--dtype float32 rounds less)" if facts.dtype != "float32" else ""
            verdict += f"; {facts.ties} part at a tie, which the rounding of {facts.dtype} decides{finer}"
        if facts.different:
            verdict += f"; {facts.different} differ"
        colour, word = ("red", "DIFFERENT") if facts.different else ("green", "identical")
        if facts.ties and not facts.different:
            colour, word = "yellow", "identical but for ties"
        console.print(f"[{colour}]{word}[/] {name}: {verdict}")
        for miss in facts.result.mismatches:
            console.print(
                f"  {'tie' if miss.tie else 'DIFFERENT'}: prompt {miss.prompt}, token {miss.position}: "
                f"expected {miss.expected}, got {miss.got}; the target prefers its own by {miss.margin:.2e} logits, "
                f"rounding reaches {miss.rounding:.2e}"
            )


@contextmanager
def _progress(console: Console, title: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal, nothing elsewhere; yields the function that advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
