"""How fast is a target by the size of its forwards: one sample or merged ones, with other settings, behind a daemon?

Every way is a process of its own, all on one device, of which one works at a time: rounds take turns over all of them,
so that a ratio is one of neighbours in time. A round runs every size, the first one for its kernels alone.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import torch

from specd.bench.machine import machine
from specd.bench.pipeline import apart
from specd.bench.pipeline.defaults import defaults
from specd.bench.pipeline.processes import Child, child, daemon
from specd.bench.pipeline.record import Timeline
from specd.bench.pipeline.settings import Settings, short_batches
from specd.bench.pipeline.step import clock
from specd.bench.target.bare import BareAnswer, BareAsk, BareJob
from specd.bench.target.result import SINGLE_TOKENS, TargetProfile, TargetResult, TargetRow, Way, ratios
from specd.client.subscriber import Subscriber
from specd.config.load import merge
from specd.config.settings import SubscriberConfig
from specd.errors import ConfigError, SpecdError, TargetError
from specd.transports.registry import load

SIZES: Final = (512, 1024, 2048, 3072, 4096, 8192)
PATIENCE_S: Final = 60.0
"""Longest wait for a bare target to load or to answer, where `limit_s` is not longer."""
MORE: Final = 2
"""A daemon's row takes this many times the forwards of a bare one: its batches arrive in bursts."""


class Plan(NamedTuple):
    """sizes: tokens of a batch, which is one sample. beside: settings of another bare target; none: there is no other.

    forwards: timed in a row and round. limit_s: no round begins after it.
    """

    sizes: tuple[int, ...] = SIZES
    beside: Mapping[str, Any] = {}
    rounds: int = 3
    forwards: int = 10
    limit_s: float = 240.0


def settings_for(model: str, plan: Plan, target: Mapping[str, Any]) -> Settings:
    """Those of the daemon and the bare targets. Raises ConfigError for what cannot be measured."""
    longest = max(plan.sizes)
    asked = {"batch_tokens": longest, "sample_tokens": longest, "short": min(plan.sizes), "many": 1}
    most = target.get("max_forward_tokens", max(longest, 8192))
    settings = defaults(False, 1, model, asked | {"target": {"max_forward_tokens": most, **target}})
    if longest > settings.forward_tokens:
        raise ConfigError(
            f"--sizes {longest}: a forward has at most target.max_forward_tokens={settings.forward_tokens} tokens; "
            f"raise it with --set, or leave the size out"
        )
    settings = msgspec.structs.replace(settings, merge_depth=settings.fed(min(plan.sizes)))
    with_beside(settings, plan.beside).daemon(settings.devices[0], 2)
    return settings


def with_beside(settings: Settings, beside: Mapping[str, Any]) -> Settings:
    """The settings of the other bare target."""
    return msgspec.structs.replace(settings, target=merge(settings.target, dict(beside)))


def run(
    settings: Settings,
    plan: Plan,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[TargetResult], None] = lambda result: None,
) -> TargetResult:
    """Measure everything; what fails beside the bare target is left out, with its reason in `skipped`.

    keep: is given the result so far after each round. Raises SpecdError when the bare target cannot run.
    """
    if settings.trainer != "cpu":
        torch.cuda.set_device(settings.trainer)
    timeline = Timeline(progress)
    found = Found(settings, plan, timeline)
    with tempfile.TemporaryDirectory(prefix="specd-", dir="/tmp") as name, ExitStack() as stack:
        timeline("loading")
        jobs: dict[Way, Settings] = {"bare": settings}
        if plan.beside:
            jobs["beside"] = with_beside(settings, plan.beside)
        children: dict[Way, Child] = {
            way: stack.enter_context(child("specd.bench.target.bare", BareJob(settings=of_way)))
            for way, of_way in jobs.items()
        }
        try:  # it starts while they load
            config = settings.daemon(settings.devices[0], settings.slots)
            found.endpoint = stack.enter_context(daemon(config, Path(name, "d.sock")))
        except SpecdError as error:
            found.skipped["daemon"] = str(error)
        for way, process in children.items():
            found.join(way, process)
        for number in range(plan.rounds + 1):
            if number > 1 and timeline.elapsed_s > plan.limit_s:
                found.skipped["rounds"] = f"{plan.rounds - number + 1} of {plan.rounds}: {plan.limit_s:g} s were over"
                break
            timeline(f"round {number} of {plan.rounds}" if number else "warming up")
            found.round(number)
            keep(found.result())
        timeline("profiles")
        found.profile()
        return found.result()


class Found:
    """What a run has found so far. endpoint: of the daemon, empty if there is none."""

    def __init__(self, settings: Settings, plan: Plan, timeline: Timeline) -> None:
        self.settings, self._plan, self._timeline = settings, plan, timeline
        self.endpoint = ""
        self.skipped: dict[str, str] = {}
        self._children: dict[Way, Child] = {}
        self._target: dict[str, Any] = {}
        self._facts = machine()
        self._nonces = itertools.count(1)
        self._rates: dict[tuple[Way, int, int], list[float]] = defaultdict(list)
        self._seconds: dict[tuple[Way, int, int], list[float]] = defaultdict(list)
        self._profiles: list[TargetProfile] = []

    def join(self, way: Way, process: Child) -> None:
        """Take a bare target that has loaded. Raises SpecdError when `bare` has not."""
        try:
            answer = self._answer(process)
        except SpecdError as error:
            if way == "bare":
                raise
            self.skipped[way] = str(error)
            process.process.kill()  # it may still be at work on the device
            return
        self._children[way] = process
        self._target = self._target or answer.target

    def round(self, number: int) -> None:
        """Every size in every way once; in the opposite order every other time. Round 0 is not kept."""
        jobs = list(self._jobs())
        for way, tokens, share in jobs if number % 2 else reversed(jobs):
            what = f"{way}, {share} × {tokens}"
            if way in self.skipped or what in self.skipped:
                continue
            try:
                seconds = self._daemon(tokens, share) if way == "daemon" else self._bare(way, tokens, share).seconds
            except SpecdError as error:
                self.skipped[what] = str(error)
                continue
            if number:
                batches = len(seconds) * (1 if way == "daemon" else share)
                self._rates[way, tokens, share].append(batches * tokens / sum(seconds))
                self._seconds[way, tokens, share].extend(() if way == "daemon" else seconds)

    def profile(self) -> None:
        """One forward of one long sample, of each bare target."""
        tokens = min(self._plan.sizes, key=lambda size: abs(size - SINGLE_TOKENS))
        for way in self._children:
            try:
                answer = self._bare(way, tokens, 1, profiled=True)
            except SpecdError as error:
                self.skipped[f"{way}, profile"] = str(error)
                continue
            self._profiles.append(
                TargetProfile(
                    way=way,
                    tokens=tokens,
                    forward_ms=answer.forward_ms,
                    busy_ms=answer.busy_ms,
                    launches=answer.launches,
                    kernels=answer.kernels,
                )
            )

    def result(self) -> TargetResult:
        """All of it."""
        rows = tuple(
            _row(way, tokens, share, rates, self._seconds[way, tokens, share])
            for (way, tokens, share), rates in sorted(self._rates.items(), key=lambda item: item[0][1:])
        )
        return TargetResult(
            machine=self._facts,
            settings=msgspec.to_builtins(self.settings),
            target=self._target,
            beside=dict(self._plan.beside),
            rounds=self._plan.rounds,
            wall_s=self._timeline.elapsed_s,
            rows=rows,
            ratios=tuple(ratios(rows)),
            profiles=tuple(self._profiles),
            skipped=self.skipped,
            began_s=self._timeline.began_s,
        )

    def _jobs(self) -> Iterator[tuple[Way, int, int]]:
        for tokens in self._plan.sizes:
            room = self.settings.room(tokens)
            for share in sorted({1, room}):
                for way in self._children:
                    yield way, tokens, share
            if self.endpoint:
                yield "daemon", tokens, room

    def _bare(self, way: Way, tokens: int, share: int, profiled: bool = False) -> BareAnswer:
        ask = BareAsk(
            tokens=tokens, share=share, forwards=self._plan.forwards, nonce=next(self._nonces), profiled=profiled
        )
        process = self._children[way]
        process.tell(ask)
        return self._answer(process)

    def _answer(self, process: Child) -> BareAnswer:
        answer = process.answer(BareAnswer, max(PATIENCE_S, self._plan.limit_s))
        if answer.error:
            raise TargetError(answer.error)
        return answer

    def _daemon(self, tokens: int, share: int) -> Sequence[float]:
        """Seconds between deliveries to a trainer that does nothing, without those while its queue fills or empties."""
        settings, depth = msgspec.structs.replace(self.settings, short=tokens), self.settings.fed(tokens)
        count, edge = MORE * self._plan.forwards * share, depth + 1
        drawn = short_batches(settings, self._target["vocab"], 1, edge + count + edge, next(self._nonces))
        with self._subscriber(depth) as link:
            return clock(link.stream(drawn), None, edge, steps=count).seconds

    def _subscriber(self, depth: int) -> Subscriber:
        """A trainer that reads slots in place where it shares the target's GPU: a copy would take the GPU's time."""
        settings, transport = self.settings, self.settings.transports[0]
        link = SubscriberConfig(
            endpoints=(self.endpoint,),
            transport=transport,
            depth=depth,
            borrow=settings.shared and load(transport).traits.borrow,
            connect_s=apart.CONNECT_S,
            timeout_s=apart.CONNECT_S,
        )
        return Subscriber(link, settings.capture, device=settings.trainer, name="bench")


def _row(way: Way, tokens: int, share: int, rates: Sequence[float], seconds: Sequence[float]) -> TargetRow:
    forward = [0.0] * 3
    if seconds:
        forward = [round(found, 3) for found in np.percentile(np.asarray(seconds) * 1e3, (50, 25, 75)).tolist()]
    return TargetRow(
        way=way,
        tokens=tokens,
        share=share,
        by_round=tuple(round(rate, 1) for rate in rates),
        tokens_per_s=round(statistics.median(rates), 1),
        low=round(min(rates), 1),
        high=round(max(rates), 1),
        forward_ms=forward[0],
        p25_ms=forward[1],
        p75_ms=forward[2],
    )
