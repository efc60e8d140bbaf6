"""Runs that share one target: what they want of it together, and whether a daemon has room for that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from specd.config.settings import CaptureConfig, RunConfig
from specd.drafts import registry
from specd.errors import ConfigError
from specd.protocol.capture import CaptureSpec, union

if TYPE_CHECKING:
    from specd.protocol.contract import TargetContract
    from specd.protocol.messages import StatusReport

Runs = Mapping[str, RunConfig]
"""Settings by the name of a run, for the target that they train on."""


def captured(runs: Runs, contract: TargetContract) -> CaptureSpec:
    """The states that all runs together want. Raises ConfigError for runs that do not suit the target or each other."""
    from specd.train.asked import travelling

    found = []
    for name, run in runs.items():
        draft = registry.settings(run.method, run.draft, f"run {name}")
        spec = registry.load(run.method).capture(draft, contract)
        if run.validation.decode_every:
            spec = msgspec.structs.replace(spec, final=True)
        found.append(travelling(run, spec))
    if len(dtypes := sorted({spec.dtype for spec in found})) > 1:
        raise ConfigError(f"runs want states in {' and in '.join(dtypes)}: expected one capture.dtype for all of them")
    return union(found)


def hosting(runs: Runs, contract: TargetContract | None) -> dict[str, Any]:
    """Settings of a daemon for these runs alone. contract: of its target, None where that shows only once it runs."""
    if contract is not None:
        spec = captured(runs, contract)
        num_taps, final = len(spec.taps), spec.final
    else:
        each = [_sized(run) for run in runs.values()]
        num_taps, final = sum(one.num_taps for one in each), any(one.final for one in each)
    count = sum(run.sessions for run in runs.values())
    return {
        "capture": {"num_taps": num_taps, "final": final},
        "ring": {
            "slots": count * (1 + max(run.subscriber.depth for run in runs.values())),
            "slot_tokens": max(run.data.batch_tokens for run in runs.values()),
            "max_sessions": count,
        },
    }


def _sized(run: RunConfig) -> CaptureConfig:
    found = registry.load(run.method).capture_config(registry.settings(run.method, run.draft, "settings"))
    return msgspec.structs.replace(found, final=found.final or run.validation.decode_every > 0)


def check_room(report: StatusReport, runs: Runs, endpoint: str) -> None:
    """Raise ConfigError where a daemon has no room for all runs at once, with the settings that give it.

    Nothing is checked of a daemon whose target is not there yet.
    """
    from specd.client.seats import narrow

    contract, ring = report.contract, report.ring
    if contract is None or ring is None:
        return
    longest = max(run.data.batch_tokens for run in runs.values())
    problems, remedy = narrow(ring, captured(runs, contract), contract.hidden_size, longest)
    if (needed := sum(run.sessions for run in runs.values())) > report.max_sessions - len(report.sessions):
        problems.append(f"{needed} trainers, where {len(report.sessions)} of {report.max_sessions} are taken")
        remedy += [f"ring.max_sessions={needed + len(report.sessions)}"]
    if problems:
        given = " ".join(f"--set {setting}" for setting in remedy)
        raise ConfigError(f"{endpoint} has no room for these runs: {'; '.join(problems)}: specd start … {given}")


def unlike(runs: Runs) -> Iterator[str]:
    """What keeps runs from sharing forwards with the first one: other batches. One line for each."""
    first, *others = runs
    for name in others:
        mine, theirs = _batches(runs[name]), _batches(runs[first])
        if differ := [f"{key} is {mine[key]}, there {theirs[key]}" for key in mine if mine[key] != theirs[key]]:
            yield f"run {name} shares no forwards with {first}, as its batches are others: {'; '.join(differ)}"


def _batches(run: RunConfig) -> dict[str, Any]:
    """The settings that say which batches a run trains."""
    data = msgspec.to_builtins(run.data)
    for name in ("cache_dir", "processes", "bad_rows"):
        del data[name]
    held = {"validation.share": run.validation.share, "validation.rows": run.validation.rows}
    return {f"data.{key}": value for key, value in data.items()} | held | {"train.seed": run.train.seed}
