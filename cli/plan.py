"""`specd plan`: from rates, given or measured, how many daemons a trainer needs and whether co-location is better."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
import typer

from specd import units
from specd.config.presets import preset, presets
from specd.drafts import registry
from specd.errors import ConfigError
from specd.plan.balance import Balance, Placement, Work, balance
from specd.plan.replay import Saving, Store, saving
from specd.protocol.capture import DTYPE_BYTES, CaptureSpec, StateDtype, plain
from specd.transports.registry import WITHIN_PROCESS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from specd.train.journal import StepRecord

EXAMPLES = (
    "Examples: `specd plan --model Qwen3-30B-A3B-FP8 --target-tokens-per-s 43800 --draft-tokens-per-s 51000 "
    "--samples 50000 --epochs 6` · `specd plan --from pipeline.json --daemons 2 --trainers 6` · "
    "`specd plan --from runs/first` · `specd plan --from runs/first --replay-gb 500 --disk-gb-s 6.5`"
)
RATES, SIZES, PLACES, REPLAY = "Rates", "Sizes", "Places", "States that daemons keep over epochs"
WARM_UP = 0.1
"""Share of a journal's first steps that is left out of its rates: they compile and load."""
MOST_WAITS = 0.05
"""Steps without draft_s give the draft's rate only if they waited less than this share of their time."""
MEASURED_WITH = (
    "target_tokens_per_s", "draft_tokens_per_s", "batch_tokens", "gpus_per_daemon", "gpus_per_trainer",
)  # fmt: skip
"""What co-location and a pipeline were measured with."""
STARVING = {
    "target": "the target starves: the draft is slower",
    "draft": "the draft starves: the target is slower",
    "wire": "both wait for the wire",
    "none": "neither: they are balanced",
}


def plan(
    target_tokens_per_s: Annotated[
        float | None, typer.Option(help="What one daemon computes.", rich_help_panel=RATES)
    ] = None,
    draft_tokens_per_s: Annotated[
        float | None, typer.Option(help="What one trainer trains.", rich_help_panel=RATES)
    ] = None,
    colocated_target_tokens_per_s: Annotated[
        float | None,
        typer.Option(help="What a target computes that runs batches one by one, unmerged.", rich_help_panel=RATES),
    ] = None,
    colocated_tokens_per_s: Annotated[
        float | None,
        typer.Option(
            help="What GPUs that hold both train, as many as the larger one takes [default: one after the other].",
            rich_help_panel=RATES,
        ),
    ] = None,
    wire_gb_per_s: Annotated[
        float | None, typer.Option(help="10⁹ bytes a second to one trainer; 0 for enough.", rich_help_panel=RATES)
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            "--from", help="`specd bench pipeline --json`, or a run directory; flags win.", rich_help_panel=RATES
        ),
    ] = None,
    batch_tokens: Annotated[
        float | None, typer.Option(help="Tokens of a trainer's batch.", rich_help_panel=SIZES)
    ] = None,
    bytes_per_token: Annotated[
        int | None, typer.Option(help="Of captured states; or give --model.", rich_help_panel=SIZES)
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Preset of the target.", rich_help_panel=SIZES)] = "",
    num_taps: Annotated[
        int, typer.Option(min=1, help="Taps, with --model; 4 for EAGLE-3: its final state, too.", rich_help_panel=SIZES)
    ] = 5,
    dtype: Annotated[
        str,
        typer.Option(help="Of the states, with --model: auto, or float8_e4m3fn.", rich_help_panel=SIZES),
    ] = "auto",
    samples: Annotated[int | None, typer.Option(help="Of the data set.", rich_help_panel=SIZES)] = None,
    tokens_per_sample: Annotated[float | None, typer.Option(help="On average.", rich_help_panel=SIZES)] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over it.", rich_help_panel=SIZES)] = None,
    gpus_per_daemon: Annotated[
        int | None, typer.Option(help="More than 1 for tensor parallelism.", rich_help_panel=PLACES)
    ] = None,
    gpus_per_trainer: Annotated[int | None, typer.Option(help="GPUs of one trainer.", rich_help_panel=PLACES)] = None,
    depth: Annotated[int | None, typer.Option(help="Batches in flight per trainer.", rich_help_panel=PLACES)] = None,
    daemons: Annotated[
        int | None,
        typer.Option(min=1, help="Judge so many daemons … [default: what balances].", rich_help_panel=PLACES),
    ] = None,
    trainers: Annotated[
        int | None, typer.Option(min=1, help="… and so many ranks of one training.", rich_help_panel=PLACES)
    ] = None,
    replay_gb: Annotated[
        float | None, typer.Option(help="10⁹ bytes that each daemon keeps.", rich_help_panel=REPLAY)
    ] = None,
    disk_gb_s: Annotated[
        float | None, typer.Option(help="10⁹ bytes a second that each reads of them.", rich_help_panel=REPLAY)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Which side starves, how many daemons a trainer needs, what it takes, and whether co-location is better."""
    flags = {
        "target_tokens_per_s": target_tokens_per_s,
        "draft_tokens_per_s": draft_tokens_per_s,
        "colocated_target_tokens_per_s": colocated_target_tokens_per_s,
        "wire_gb_per_s": wire_gb_per_s,
        "batch_tokens": batch_tokens,
        "bytes_per_token": bytes_per_token,
        "samples": samples,
        "tokens_per_sample": tokens_per_sample,
        "epochs": epochs,
        "gpus_per_daemon": gpus_per_daemon,
        "gpus_per_trainer": gpus_per_trainer,
        "depth": depth,
    }
    if dtype != "auto" and not model:
        raise ConfigError(f"--dtype {dtype}: expected --model with it; what --from names has a dtype of its own")
    known = _of_preset(model, num_taps, dtype) if model else {}
    known |= (
        _measured(measured, target=target_tokens_per_s is None, draft=draft_tokens_per_s is None) if measured else {}
    )
    if any(flags[name] is not None for name in MEASURED_WITH):  # what was measured with others says nothing of these
        known.pop("colocated_tokens_per_s", None)
        known.pop("efficiency", None)
    known |= {name: value for name, value in flags.items() if value is not None}
    if colocated_tokens_per_s is not None:
        group = max(known.get("gpus_per_daemon", 1), known.get("gpus_per_trainer", 1))
        known["colocated_tokens_per_s"] = {group: colocated_tokens_per_s}
    asked = (daemons or 1, trainers or 1) if daemons or trainers else (0, 0)
    if (replay_gb is None) != (disk_gb_s is None):
        raise ConfigError(f"--replay-gb {replay_gb} --disk-gb-s {disk_gb_s}: expected both, or neither")
    found = balance(_work(known), *asked)
    saved = None
    if replay_gb is not None and disk_gb_s is not None:
        saved = saving(found.work, found.judged, Store(gb=replay_gb, disk_gb_per_s=disk_gb_s))
    if as_json:
        facts = msgspec.to_builtins(found) | ({} if saved is None else {"replay": msgspec.to_builtins(saved)})
        typer.echo(msgspec.json.format(msgspec.json.encode(facts), indent=2).decode())
        return
    from rich.console import Console

    Console().print(*render(found), *(replayed(saved) if saved is not None else ()), sep="\n")


def _work(known: dict[str, Any]) -> Work:
    """A Work from the known values. Raises ConfigError that names all missing ones."""
    needed = ("target_tokens_per_s", "draft_tokens_per_s", "batch_tokens", "bytes_per_token")
    missing = [f"--{name.replace('_', '-')}" for name in needed if name not in known]
    if missing:
        raise ConfigError(
            f"not enough to plan with: give {', '.join(missing)}, or --from with the JSON of `specd bench pipeline` "
            f"or a run directory; --model PRESET stands for --batch-tokens and --bytes-per-token"
        )
    return Work(**known)


def _of_preset(name: str, num_taps: int, dtype: str) -> dict[str, Any]:
    """Batch and bytes of a preset's recipe. Raises ConfigError for a preset or a dtype that there is not."""
    if dtype not in ("auto", *DTYPE_BYTES):
        raise ConfigError(f"--dtype {dtype!r}: expected auto, for the preset's, or one of {', '.join(DTYPE_BYTES)}")
    recipe = preset(name)
    if recipe is None or "hidden_size" not in recipe.config:
        raise ConfigError(f"--model {name!r}: expected one of {', '.join(presets())}; else give --bytes-per-token")
    asked = recipe.dtype if dtype == "auto" else cast(StateDtype, dtype)
    spec = CaptureSpec(taps=tuple(range(num_taps)), dtype=asked)
    tokens = recipe.run.get(registry.DEFAULT, {}).get("data", {}).get("batch_tokens", 3072)
    return {"bytes_per_token": spec.bytes_per_token(int(recipe.config["hidden_size"])), "batch_tokens": tokens}


def _measured(path: Path, *, target: bool, draft: bool) -> dict[str, Any]:
    """The rates a benchmark or a run has measured. Raises ConfigError for a path that holds neither.

    target, draft: whether a run must give that one's rate.
    """
    if path.is_dir():
        return _of_run(path, target=target, draft=draft)
    try:
        found = json.loads(path.read_bytes())["work"]
        if found is None:
            raise ConfigError(f"--from {str(path)!r}: this benchmark ended before it had rates; run it again")
        return msgspec.structs.asdict(msgspec.convert(found, Work, str_keys=True))
    except OSError as error:
        raise ConfigError(f"--from {str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--from {str(path)!r} is not the JSON of `specd bench pipeline` ({error!r}): expected that or a run "
            f"directory"
        ) from None


def _of_run(path: Path, *, target: bool, draft: bool) -> dict[str, Any]:
    """Rates of a run: its daemons' forward times and, for the draft's, its optimizer steps' own times.

    The forwards are as its daemons ran them, merged or not; steps with batches that needed none tell nothing of them.
    A co-located run's are unmerged: they give both rates, and on one device its steps say what both take together.
    Raises ConfigError for a journal without these times.
    """
    from specd.train.directory import JOURNAL, read_facts
    from specd.train.journal import read

    facts, records = read_facts(path), read(path / JOURNAL)
    steps = records[int(len(records) * WARM_UP) :]
    tokens = sum(step.tokens for step in steps)
    computed = [step for step in steps if not (step.shared or step.replayed)]
    forward_s = sum(step.forward_s for step in computed)
    batches = sum(len(step.batches) for step in steps)
    samples = sum(len(batch.samples) for step in steps for batch in step.batches)
    if not (tokens and (forward_s or not target)):
        raise ConfigError(
            f"--from {str(path)!r}: its journal has no step with a forward time yet, all of whose batches needed one: "
            f"name a run that shared none, or give --target-tokens-per-s"
        )
    dtype = facts.config.get("capture", {}).get("dtype", "auto")
    taps = str(facts.draft["taps"]).split(",")
    method = str(facts.config.get("method", registry.DEFAULT))
    asked = registry.settings(method, facts.config.get("draft", {}), f"--from {str(path)!r}")
    final = registry.load(method).capture_config(asked).final
    spec = CaptureSpec(
        taps=tuple(range(len(taps))),
        final=final,
        dtype=plain(str(facts.target["dtype"])) if dtype == "auto" else dtype,
    )
    known: dict[str, Any] = {
        **({"target_tokens_per_s": sum(step.tokens for step in computed) / forward_s} if forward_s else {}),
        "batch_tokens": tokens / batches,
        "tokens_per_sample": tokens / samples,
        "bytes_per_token": spec.bytes_per_token(int(facts.target["hidden size"])),
        "samples": int(str(facts.data["samples"]).replace(",", "")),
        "depth": facts.config["subscriber"]["depth"],
        "epochs": facts.config["train"]["epochs"],
    }
    if draft:
        known["draft_tokens_per_s"] = _draft_rate(path, steps)
    if forward_s and WITHIN_PROCESS in facts.transports.values():
        known["colocated_target_tokens_per_s"] = known["target_tokens_per_s"]
        hosted, device = facts.config.get("target"), facts.config["train"].get("device")
        if hosted and hosted.get("device", device) == device:
            together = [step for step in computed if step.ranks == computed[-1].ranks]
            rate = sum(step.tokens for step in together) / sum(step.step_s for step in together)
            known["colocated_tokens_per_s"] = {computed[-1].ranks: rate}
    return known


def _draft_rate(path: Path, steps: Sequence[StepRecord]) -> float:
    """Tokens a second of one rank's optimizer steps. Raises ConfigError where the time without waits is unknown."""
    if timed := [step for step in steps if step.draft_s]:
        return sum(step.tokens / step.ranks for step in timed) / sum(step.draft_s for step in timed)
    wall_s, wait_s = sum(step.step_s for step in steps), sum(step.target_wait_s + step.wire_wait_s for step in steps)
    # A GPU goes on with its step while the host waits for the next batch: wall time without waits is too short.
    if wait_s >= MOST_WAITS * wall_s:
        raise ConfigError(
            f"--from {str(path)!r}: its journal has no draft_s, and its steps waited {wait_s:.1f} of {wall_s:.1f} s, "
            f"when a GPU may have trained: give --draft-tokens-per-s, or --from with the JSON of `specd bench "
            f"pipeline` or with a run whose journal has draft_s"
        )
    return sum(step.tokens / step.ranks for step in steps) / (wall_s - wait_s)


def render(found: Balance) -> list[RenderableType]:
    """The balance for people: times, the placements side by side, the verdict."""
    from rich.table import Table

    work = found.work
    title = f"a batch of {work.batch_tokens:,.0f} tokens"
    times = Table(title, "ms", "tokens/s", box=None, padding=(0, 2, 0, 0))
    lines = [("on one daemon", found.target_s), ("on one trainer", found.draft_s), ("on the wire", found.wire_s)]
    if work.colocated_target_tokens_per_s:
        lines.insert(1, ("on a co-located target", found.colocated_target_s))
    for name, seconds in lines:
        rate = f"{work.batch_tokens / seconds:,.0f}" if seconds else "–"
        times.add_row(name, f"{seconds * 1e3:,.2f}" if seconds else "not counted", rate)
    placed = Table(box=None, padding=(0, 2, 0, 0))
    for head in ("daemons : trainers", "GPUs", "ms/batch", "samples/s", "GPU·s/sample", "hours", "GPU-hours"):
        placed.add_column(head, justify="left" if head == "daemons : trainers" else "right", no_wrap=True)
    apart = (found.one_to_one, found.balanced, *([found.asked] if found.asked else []))
    placements = {placement.name: placement for placement in (*apart, found.colocated, found.data_parallel)}
    for placement in placements.values():
        placed.add_row(*_cells(placement))
    judged = found.judged
    needed = found.daemons_per_trainer
    per = f"{needed:.2f} daemons a trainer" if needed >= 1 else f"{1 / needed:.2f} trainers a daemon"
    ring = found.ring
    facts = [
        f"one daemon, one trainer: {STARVING[found.starves]}; {per} balance them ({found.balanced.name})",
        f"a sample is {found.bytes_per_sample:,} bytes; each daemon's ring: {ring.slots} slots × "
        f"{ring.slot_bytes:,} bytes = {ring.nbytes / 1e9:.2f} GB at depth {work.depth}",
        f"{judged.name} trains {judged.over_one:.2f} × the samples/s of {_gpus(found.colocated.gpus)} co-located, and "
        f"{judged.over_parallel:.2f} × those of {_gpus(judged.gpus)}, as many as it has",
        f"co-locate unless a target that runs batches alone takes over {found.pays_from_s * 1e3:,.1f} ms for one: here "
        f"{found.colocated_target_s * 1e3:,.1f} ms"
        if not work.colocated_tokens_per_s
        else f"co-location as measured: {found.overlapped:.2f} of target and draft one after the other",
        *([f"pipelines as measured: {work.efficiency:.2f} of what these rates allow"] if work.efficiency != 1 else ()),
        f"verdict: {found.better}",
        *(f"· {reason}" for reason in found.why),
    ]
    return [times, "", placed, "", *facts]


def replayed(found: Saving) -> list[RenderableType]:
    """What keeping states saves, for people."""
    return [
        "",
        f"states kept over epochs, {found.placement}: {found.outcome}",
        *(f"· {reason}" for reason in found.why),
        f"a disk breaks even at {found.break_even_gb_per_s:.2g} GB/s: there it reads states as fast as a daemon's "
        f"target makes them",
        f"epochs: the first {units.duration(found.first_s)}, later ones {units.duration(found.later_s)}; all of them "
        f"{found.hours:,.2f} h in place of {found.hours_without:,.2f} h",
    ]


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"


def _cells(placement: Placement) -> tuple[str, ...]:
    sized = placement.hours > 0
    return (
        placement.name,
        str(placement.gpus),
        f"{placement.batch_s * 1e3:,.2f}",
        f"{placement.samples_per_s:,.2f}",
        f"{placement.gpu_s_per_sample:,.4g}",
        f"{placement.hours:,.2f}" if sized else "–",
        f"{placement.gpu_hours:,.2f}" if sized else "–",
    )
