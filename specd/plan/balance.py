"""Whether disaggregation pays: times, ring and GPU-hours of a training, computed from rates alone.

Per GPU-second a perfectly balanced disaggregation costs what co-location costs: every batch needs its target's forward
and its draft's step, wherever they run. It can only win where a daemon's forwards are cheaper than co-located ones, and
it loses whatever one side idles. Co-location gains where a step fills the gaps of a forward: how much, only a
measurement tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import msgspec

from specd.errors import ConfigError

Side = Literal["target", "draft", "wire", "none"]
MOST_PROCESSES = 8
"""Placements of up to 8 daemons and trainers together are compared."""
EVEN = 0.02
"""Costs within 2 % of each other count as equal: below run-to-run noise."""


class Work(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The workload: throughput of target and draft, sizes of batches, samples and states.

    target_tokens_per_s: of one daemon. draft_tokens_per_s: of one trainer, the whole optimizer step.
    colocated_target_tokens_per_s: of a target that runs each batch alone, on as many GPUs as a daemon; 0 for the same:
    a daemon merges small batches of several requests into one forward, a co-located target cannot.
    colocated_tokens_per_s: of target and draft on the same GPUs, by how many these are, where it was measured; else one
    is taken to run after the other. efficiency: of a pipeline, what these rates allow over what it took, where that was
    measured.
    batch_tokens: of one trainer batch. tokens_per_sample: on average. bytes_per_token: of the captured states.
    wire_gb_per_s: 10⁹ bytes a second to one trainer; 0 if it never waits for the wire. depth: batches in flight beyond
    the one in use.
    """

    target_tokens_per_s: float
    draft_tokens_per_s: float
    batch_tokens: float
    bytes_per_token: int
    colocated_target_tokens_per_s: float = 0.0
    colocated_tokens_per_s: dict[int, float] = {}
    efficiency: float = 1.0
    wire_gb_per_s: float = 0.0
    tokens_per_sample: float = 0.0
    samples: int = 0
    epochs: float = 1.0
    gpus_per_daemon: int = 1
    gpus_per_trainer: int = 1
    depth: int = 2

    @property
    def target_s(self) -> float:
        """Of a batch on one daemon."""
        return self.batch_tokens / self.target_tokens_per_s

    @property
    def draft_s(self) -> float:
        """Of a batch on one trainer."""
        return self.batch_tokens / self.draft_tokens_per_s

    @property
    def wire_s(self) -> float:
        """Of a batch on one wire, 0 if that is not counted."""
        return self.batch_tokens * self.bytes_per_token / (self.wire_gb_per_s * 1e9) if self.wire_gb_per_s else 0.0

    @property
    def alone_s(self) -> float:
        """Of a batch on a target that runs it alone."""
        return self.batch_tokens / (self.colocated_target_tokens_per_s or self.target_tokens_per_s)

    @property
    def serial_s(self) -> float:
        """GPU-seconds of a batch's forward, alone, and then of its step."""
        return self.gpus_per_daemon * self.alone_s + self.gpus_per_trainer * self.draft_s

    def together_s(self, gpus: int) -> float:
        """Between two batches of co-located training on so many GPUs, each as fast as of the most that were measured.

        Where none were, it is at its best as long as one runs after the other: no GPU idles, also where target and
        draft take different numbers of them.
        """
        measured = self.colocated_tokens_per_s
        if not measured:
            return self.serial_s / gpus
        known = max((count for count in measured if count <= gpus), default=min(measured))
        return self.batch_tokens / measured[known] * known / gpus


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """One way to place the work.

    batch_s: seconds between two batches of the whole placement. gpu_s_per_sample: what a sample occupies, idle GPUs
    included. hours, gpu_hours: of the whole training, 0 if its size is not known. over_one: how many times the samples
    of one co-located group of GPUs it trains; over_parallel: of co-located training on as many GPUs as it has.
    """

    name: str
    daemons: int
    trainers: int
    gpus: int
    batch_s: float
    samples_per_s: float
    gpu_s_per_sample: float
    hours: float
    gpu_hours: float
    over_one: float = 1.0
    over_parallel: float = 1.0


class RingSize(msgspec.Struct, frozen=True, kw_only=True):
    """The ring of one daemon in the placement that is judged: `slots` batches of `slot_bytes` each."""

    slots: int
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_bytes


class Balance(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of `balance`.

    target_s, draft_s, wire_s: of one batch, on one daemon, one trainer, one wire. starves: who waits when one daemon
    feeds one trainer: `draft` if the target is slower, `none` within 2 %; `wire` if both wait for the wire.
    daemons_per_trainer: what balances the two. one_to_one: one daemon and one trainer. balanced: the smallest placement
    within 2 % of the least GPU time a sample. asked: the one that was asked for, if one was. colocated: on the GPUs of
    one daemon or trainer. data_parallel: co-located on as many GPUs as the one that is judged: `asked`, or else
    `balanced`. better: that, or co-location. pays_from_s: it is that from a target on which a batch alone takes longer,
    in seconds; 0 for any, and where co-location was measured. why: in words.
    """

    work: Work
    target_s: float
    draft_s: float
    wire_s: float
    colocated_target_s: float
    starves: Side
    daemons_per_trainer: float
    bytes_per_sample: int
    ring: RingSize
    one_to_one: Placement
    balanced: Placement
    colocated: Placement
    data_parallel: Placement
    better: Literal["disaggregated", "co-located", "equal"]
    why: tuple[str, ...]
    asked: Placement | None = None
    pays_from_s: float = 0.0

    @property
    def judged(self) -> Placement:
        """The placement that is held against co-location."""
        return self.asked or self.balanced

    @property
    def overlapped(self) -> float:
        """What a batch takes co-located, over its forward and then its step: 1 unless it was measured."""
        return self.colocated.gpus * self.colocated.batch_s / self.work.serial_s


def balance(work: Work, daemons: int = 0, trainers: int = 0) -> Balance:
    """Weigh disaggregation against co-location: the best placement, or that of `daemons` and `trainers` if given.

    Raises ConfigError for rates and sizes out of range.
    """
    _check(work, daemons, trainers)
    choices = [pipeline(work, d, t) for d in range(1, MOST_PROCESSES) for t in range(1, MOST_PROCESSES + 1 - d)]
    least = min(choice.gpu_s_per_sample for choice in choices)
    # The smallest within noise of the best: a few per cent are not worth eight more GPUs.
    balanced = min((c for c in choices if c.gpu_s_per_sample <= least * (1 + EVEN)), key=lambda c: c.gpus)
    asked = pipeline(work, daemons, trainers) if daemons else None
    judged = asked or balanced
    group = max(work.gpus_per_daemon, work.gpus_per_trainer)
    colocated = _placement(work, "co-located", 0, 1, group, work.together_s(group))
    replicas = judged.gpus // group
    parallel = _placement(work, f"co-located × {replicas}", 0, replicas, judged.gpus, work.together_s(judged.gpus))

    def beside(one: Placement) -> Placement:
        """The placement with what it trains beside co-located GPUs."""
        over_one, over_parallel = (work.together_s(gpus) / one.batch_s for gpus in (group, one.gpus))
        return msgspec.structs.replace(one, over_one=over_one, over_parallel=over_parallel)

    slower = max(work.target_s, work.draft_s)
    starves: Side = "none"
    if work.wire_s > slower * (1 + EVEN):
        starves = "wire"
    elif abs(work.target_s - work.draft_s) > EVEN * slower:
        starves = "draft" if work.target_s > work.draft_s else "target"
    gain = parallel.gpu_s_per_sample / judged.gpu_s_per_sample - 1
    better: Literal["disaggregated", "co-located", "equal"] = "equal"
    if abs(gain) > EVEN:
        better = "disaggregated" if gain > 0 else "co-located"
    slot_bytes = math.ceil(work.batch_tokens * work.bytes_per_token / 4096) * 4096
    in_flight = math.ceil(judged.trainers * (work.depth + 1) / judged.daemons)
    pays_from_s = (judged.gpus * judged.batch_s - work.gpus_per_trainer * work.draft_s) / work.gpus_per_daemon
    found = Balance(
        work=work,
        target_s=work.target_s,
        draft_s=work.draft_s,
        wire_s=work.wire_s,
        colocated_target_s=work.alone_s,
        starves=starves,
        daemons_per_trainer=work.target_s / max(work.draft_s, work.wire_s),
        bytes_per_sample=round(work.bytes_per_token * (work.tokens_per_sample or work.batch_tokens)),
        ring=RingSize(slots=max(in_flight, judged.trainers), slot_bytes=slot_bytes),
        one_to_one=beside(pipeline(work, 1, 1)),
        balanced=beside(balanced),
        colocated=beside(colocated),
        data_parallel=beside(parallel),
        better=better,
        why=(),
        asked=beside(asked) if asked else None,
        pays_from_s=0.0 if work.colocated_tokens_per_s else max(0.0, pays_from_s),
    )
    return msgspec.structs.replace(found, why=tuple(_why(found)))


def pipeline(work: Work, daemons: int, trainers: int) -> Placement:
    """So many daemons and trainers, beside nothing yet: as fast as the slowest of targets, drafts and wires allows."""
    batch_s = max(work.target_s / daemons, work.draft_s / trainers, work.wire_s / trainers) / work.efficiency
    gpus = daemons * work.gpus_per_daemon + trainers * work.gpus_per_trainer
    return _placement(work, f"{daemons} : {trainers}", daemons, trainers, gpus, batch_s)


def _placement(work: Work, name: str, daemons: int, trainers: int, gpus: int, batch_s: float) -> Placement:
    samples_per_batch = work.batch_tokens / (work.tokens_per_sample or work.batch_tokens)
    samples_per_s = samples_per_batch / batch_s
    hours = work.samples * work.epochs / samples_per_s / 3600
    return Placement(
        name=name,
        daemons=daemons,
        trainers=trainers,
        gpus=gpus,
        batch_s=batch_s,
        samples_per_s=samples_per_s,
        gpu_s_per_sample=gpus / samples_per_s,
        hours=hours,
        gpu_hours=hours * gpus,
    )


def _why(found: Balance) -> Iterator[str]:
    """The verdict's reasons, the decisive one first."""
    work, judged = found.work, found.judged
    ratio = judged.gpu_s_per_sample / found.data_parallel.gpu_s_per_sample
    measured = bool(work.colocated_tokens_per_s)
    if found.better == "disaggregated" and measured:
        yield f"{judged.name} takes {1 - ratio:.0%} less GPU time a sample than co-location does on as many GPUs"
    elif found.better == "disaggregated":
        yield (
            f"a daemon's forwards take {work.target_s * 1e3:.1f} ms a batch where a co-located target takes "
            f"{work.alone_s * 1e3:.1f} ms: worth more than what its GPUs idle, {1 - ratio:.0%} less GPU time a sample"
        )
    elif found.better == "co-located":
        yield (
            f"co-location is the better choice: {judged.name} takes {ratio:.2f} × its GPU time a sample, and as many "
            f"GPUs co-located train faster"
        )
    else:
        yield (
            "no difference in GPU time a sample: balanced, a disaggregation costs what co-location costs, and "
            "co-location has fewer parts; take it unless one of the reasons below counts"
        )
    for name, busy_s in (("daemons", work.target_s / judged.daemons), ("trainers", work.draft_s / judged.trainers)):
        if (busy := busy_s / judged.batch_s) < 1 - EVEN:
            yield f"the {name}' GPUs idle {1 - busy:.0%} of the time"
    if work.alone_s > work.target_s * (1 + EVEN):
        yield "a daemon only merges batches that wait: give trainers a depth of as many as a forward takes"
    if work.wire_s > max(work.target_s, work.draft_s):
        yield f"the wire needs {work.wire_s * 1e3:.1f} ms a batch, more than target and draft: take a faster one"
    if found.better != "co-located" and not measured:
        yield (
            f"a co-located GPU was taken to run target and draft one after the other, {work.serial_s * 1e3:,.1f} ms of "
            f"GPU time a batch. Where they overlap it takes less, and under {judged.gpus * judged.batch_s * 1e3:,.1f} "
            f"ms it is the better choice: measure it with `specd bench pipeline`, or give --colocated-tokens-per-s"
        )
    if not (work.colocated_target_tokens_per_s or measured):
        yield (
            "a co-located target was taken to be as fast as a daemon's; with short samples it is not, because only a "
            "daemon merges several batches into a forward: measure it, and give --colocated-target-tokens-per-s"
        )
    if found.better != "disaggregated":
        yield (
            "reasons for a daemon all the same: target and draft do not fit in one GPU together, the target needs "
            "tensor parallelism and the draft does not, several trainers draw from one target, or targets and trainers "
            "come and go on their own"
        )


def _check(work: Work, daemons: int, trainers: int) -> None:
    """Raise ConfigError that names the first value out of range."""
    if min(daemons, trainers) < 0 or (daemons > 0) != (trainers > 0):
        raise ConfigError(f"--daemons {daemons} --trainers {trainers}: expected both at least 1, or neither given")
    positive = ("target_tokens_per_s", "draft_tokens_per_s", "batch_tokens", "bytes_per_token", "epochs")
    whole = ("gpus_per_daemon", "gpus_per_trainer")
    not_negative = ("colocated_target_tokens_per_s", "wire_gb_per_s", "tokens_per_sample", "samples", "depth")
    for names, least, expected in (
        (positive, 0, "more than 0"),
        (whole, 1, "at least 1"),
        (not_negative, 0, "0 or more"),
    ):
        for name in names:
            value = float(getattr(work, name))
            if not math.isfinite(value) or value < least or (value == 0 and names is positive):
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}: expected a number, {expected}")
    if not math.isfinite(work.efficiency) or work.efficiency <= 0:
        raise ConfigError(f"an efficiency of {work.efficiency:g}: expected a number, more than 0")
    for gpus, rate in work.colocated_tokens_per_s.items():
        if not math.isfinite(rate) or rate <= 0 or gpus < 1:
            raise ConfigError(f"--colocated-tokens-per-s {rate:g} on {gpus} GPUs: expected a number, more than 0")
    if work.tokens_per_sample > work.batch_tokens:
        raise ConfigError(
            f"--tokens-per-sample {work.tokens_per_sample:g} is more than --batch-tokens {work.batch_tokens:g}: a "
            f"sample has to fit in a batch"
        )
    if work.colocated_target_tokens_per_s > work.target_tokens_per_s * (1 + EVEN):
        raise ConfigError(
            f"--colocated-target-tokens-per-s {work.colocated_target_tokens_per_s:g} is more than a daemon's "
            f"{work.target_tokens_per_s:g}: it runs the same forwards, so give the daemon's rate at least as high"
        )
