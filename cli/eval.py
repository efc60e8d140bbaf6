"""`specd eval`: greedy speculative decoding with a draft, and the proof that it changes no output."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specd.cli.settings import Prompts, TrustRemoteCode, data_config, named
from specd.cli.training import taken_away, then
from specd.config.settings import DataConfig
from specd.data.rows import HELDOUT
from specd.drafts import registry
from specd.errors import CheckpointError, ConfigError
from specd.paths import replacing

if TYPE_CHECKING:
    from rich.console import Console

    from specd.evaluate.results import EvalFacts
    from specd.targets.source import Source
    from specd.train.directory import RunFacts
    from specd.train.export import Found

EXAMPLES = (
    f"Examples: `specd eval runs/{registry.DEFAULT}` · "
    "`specd eval runs/first/draft --model smollm2-135m --data prompts.jsonl --untrained --limit 8`"
)

READING = ("template", "date", "columns", "format", "bad_rows", "split", "subset")
"""Settings of data by which prompts are read."""


def evaluate(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="DRAFT", help="A draft's directory, a run or a checkpoint.", show_default=False),
    ] = None,
    draft: Annotated[Path | None, typer.Option("--draft", "-d", help="The same as DRAFT.", show_default=False)] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="The draft's target; by default the one the run was trained on.")
    ] = "",
    other_target: Annotated[
        bool, typer.Option("--other-target", help="With --model: it need not be the one the run was trained on.")
    ] = False,
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", help="Directory of its tokenizer, where the target has none.")
    ] = "",
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="Conversations or prompts: file, folder, glob or hub name; else some that come with specd. Give it "
            "again for more.",
            metavar="FILE",
        ),
    ] = None,
    prompts: Prompts = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    limit: Annotated[int, typer.Option(min=0, help="Use at most N prompts, 0 for all.")] = 0,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Also decode with the draft as it was before training, to compare.")
    ] = False,
    unary: Annotated[
        bool, typer.Option("--unary", help="Also decode without what joins the guesses of a dflash2 or dspark draft.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 (shows identity best), bfloat16 or float16.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="How prompts are read, as data.template.enable_thinking=false, data.bad_rows=skip."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")] = False,
) -> None:
    """Decode prompts with a draft and without it: acceptance length, and whether every output is identical.

    The target runs in this process. Results also go to the draft's run or checkpoint and into its README.
    Of a conversation the first question is asked; a target without a chat template goes on with a prompt as it stands.
    The chat template gets the run's options; --set data.template.KEY=VALUE changes them, or gives them without a run.

    Exits with 1 when an output differs from the target's own greedy one, unless by a tie: two logits that are equal
    within the rounding of the target's dtype.
    """
    import msgspec
    from rich.console import Console

    from specd.data.tokenizer import load_tokenizer
    from specd.evaluate.evaluator import evaluate_draft
    from specd.evaluate.results import EVALS
    from specd.targets.source import TOKENIZERS
    from specd.targets.transformers.load import load_network
    from specd.targets.transforms import measured
    from specd.train.directory import beginning
    from specd.train.export import find, refresh, run_facts

    if (source is None) == (draft is None):
        raise ConfigError("give one draft: specd eval DRAFT, with a draft's directory, a run or a checkpoint")
    found = find(source or draft or Path())
    directory, facts, home = found.directory, run_facts(found), found.home
    of_run = found.run if found.checkpoint is None else None
    reading = _reading(named(data, prompts), model, settings, facts)
    registry.read(directory)  # fail before the target is loaded
    target, own = _target(model, tokenizer, facts, found, other_target, trust_remote_code)
    network = load_network(
        target, dtype=dtype, device=device, load_format="auto", num_layers=0, trust_remote_code=trust_remote_code
    )
    place = target.tokenizer or target.path
    tokenized = any(target.file(name) is not None for name in TOKENIZERS)
    console = Console(quiet=as_json)
    began = beginning(facts) if facts and untrained else 0
    results = evaluate_draft(
        directory,
        network,
        load_tokenizer(place) if place and tokenized else None,
        reading,
        name=target.name,
        limit=limit,
        max_new_tokens=max_new_tokens,
        untrained=began if untrained else None,
        unary=unary,
        embedding_scale=measured(network).embedding_scale,
        progress=lambda title, total: _progress(console, title, total),
    )
    if as_json:
        typer.echo(msgspec.json.encode(results))
    else:
        show(console, results)
        if facts and not own:
            console.print(f"not kept with {home}: it was trained on another target", style="dim", highlight=False)
    if facts and own:
        for name, result in results.items():
            try:
                with replacing(home / EVALS[name]) as file:
                    file.write(msgspec.json.encode(result) + b"\n")
            except OSError as error:
                raise CheckpointError(
                    f"cannot write {home / EVALS[name]}: {error.strerror}; the figures are those above, and the report "
                    f"does not have them"
                ) from None
        refresh(found)
        if not as_json:
            name = shlex.quote(str(of_run or found.checkpoint or directory))
            if of_run:
                then(f"specd report {name}", taken_away(name))
            else:
                then(f"specd export {name}" if found.checkpoint else f"specd push {name} OWNER/NAME")
    if any(result.different for result in results.values()):
        raise typer.Exit(1)


def _target(
    model: str, tokenizer: str, facts: RunFacts | None, found: Found, other_target: bool, code: bool
) -> tuple[Source, bool]:
    """The target to evaluate on, and whether it is that of the run, or there is no run.

    Raises ConfigError when it is another and need not be, or is not on this machine.
    """
    from specd.targets.identity import check_same
    from specd.targets.source import resolve, with_tokenizer

    whose = str(found.directory if found.facts and not found.run else found.home)
    trained = str(facts.target.get("model", "")) if facts else ""
    if not (model or trained):
        raise ConfigError(f"{found.directory} does not name its target: give --model")
    if not model and Path(trained).is_absolute() and not Path(trained).is_dir():
        raise ConfigError(
            f"the target of {whose}, {trained!r}, is no directory of this machine: it was moved, or a "
            f"daemon on another machine hosted it; give --model DIR with the same checkpoint"
        )
    hosted = facts.config.get("target", {}).get("tokenizer", "") if facts else ""
    source = with_tokenizer(resolve(model or trained, code=code), tokenizer or ("" if model else hosted))
    fingerprint = str(facts.target.get("fingerprint", "")) if facts else ""
    if not fingerprint:
        return source, True
    try:
        check_same(source, fingerprint, run=whose)
    except ConfigError:
        if not other_target:
            raise
        return source, False
    return source, True


def _reading(files: tuple[str, ...], model: str, settings: list[str] | None, facts: RunFacts | None) -> DataConfig:
    """How prompts are read: the run's template options and day, then `--set`. Raises ConfigError for other settings."""
    for text in settings or []:
        key = text.removeprefix("data.").partition("=")[0].partition(".")[0]
        if key not in READING:
            raise ConfigError(
                f"--set {text}: evaluation takes what prompts are read by: data.{', data.'.join(READING)}; name files "
                f"with --data, and their number with --limit"
            )
    trained = facts.config.get("data", {}) if facts else {}
    own = {key: trained[key] for key in ("template", "date") if key in trained}
    return data_config(files or (HELDOUT,), model, settings, run=own if facts else None)


def show(console: Console, results: dict[str, EvalFacts]) -> None:
    """Print what was measured, with its definition, and the proof of identity."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from specd.evaluate import intervals

    first = next(iter(results.values()))
    offsets = range(1, first.block_size)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("draft")
    for heading in ("acceptance length", "target forwards", "tokens", "tokens/s", "without draft"):
        table.add_column(heading, justify="right")
    accepted = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="guesses accepted at offset", title_justify="left")
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
        if sure := intervals.said(facts.result.prompts):
            console.print(f"acceptance length of {name}, {sure} (prompts drawn anew)", highlight=False)
    for fault in first.bad:
        console.print(f"[yellow]left out[/] {fault.rows:,} rows: {fault.kind}; the first:", Text(fault.first))
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
