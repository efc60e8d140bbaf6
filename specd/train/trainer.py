"""The recipe: from settings and daemons to a trained, exported draft.

    own the directory → connect → what the target is → settings that follow from it → data → draft → loop → export

Settings are checked as early as they can be: before a target is loaded or a transport attached.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import torch
import zmq
from msgspec.structs import replace

from specd.client.peers import Keeping
from specd.client.seats import Seat
from specd.client.subscriber import Subscriber
from specd.config.load import convert
from specd.config.settings import Config, RunConfig
from specd.data.batching import Loader
from specd.data.dataset import Dataset
from specd.data.payloads import ImagePayloads
from specd.data.tokenizer import ends_of
from specd.drafts import registry
from specd.drafts.base import Objective
from specd.memory.streams import on_device
from specd.protocol.capture import CaptureSpec, StateDtype
from specd.protocol.contract import TargetContract
from specd.train import launcher
from specd.train.asked import Settle, by_target, check, check_recipe, is_finished, output_of, see_init, travelling
from specd.train.checkpoint import Checkpoints
from specd.train.decoding import decoder
from specd.train.directory import RunDirectory, RunFacts, identity, machine_facts, target_files, utc, write_facts
from specd.train.display import Display
from specd.train.distributed import Ranks
from specd.train.export import sign
from specd.train.interrupt import Interrupt
from specd.train.journal import Sink, read, tell_unless_trained
from specd.train.limit import TimeLimit, spent
from specd.train.loop import train
from specd.train.owner import owned
from specd.train.plan import Plan, longest, planned
from specd.train.preparation import (
    data_facts,
    prepared,
    target_parts,
    warn_of_length,
    warn_of_packing,
    with_data,
    with_date,
    with_dtype,
)
from specd.train.shortage import out_of_memory
from specd.train.sinks import opened
from specd.train.validation import Held
from specd.train.validation import planned as measurements
from specd.transports import registry as transports

logger = logging.getLogger(__name__)

TARGETS_OWN = ("config.json", "preprocessor_config.json")
"""Files of a target that are not its draft's: that reads no images."""


class LocalDaemon(Protocol):
    """A daemon inside this process, as `specd.embedded` yields it."""

    @property
    def endpoint(self) -> str: ...

    @property
    def context(self) -> zmq.Context[zmq.Socket[bytes]]: ...


class TrainedRun(NamedTuple):
    """What a run left behind.

    steps: optimizer steps of its whole life. was_finished: this call found it so. ranks: how many trained it here.
    """

    directory: Path
    draft: Path
    steps: int
    was_finished: bool = False
    ranks: int = 1


def train_draft(
    config: RunConfig | Mapping[str, Any] | Settle,
    *,
    host: LocalDaemon | AbstractContextManager[LocalDaemon] | None = None,
    resume: bool = False,
    interrupt: Interrupt | None = None,
    show: bool = False,
    ranks: Ranks | None = None,
) -> TrainedRun:
    """Train a draft on the hidden states of `host` or of `config.subscriber`'s daemons, and export it to OUTPUT/draft.

    config: the settings; as a mapping, on top of the recipe of the target's preset; or a function that gives them for
    the target's name (then also called with an empty one, before a target is known: output, device and daemons must
    not depend on it). Only whoever hosts a target reads the section `target`, so settings that are no function may not
    have it. host: a daemon of this process, or a context that makes one, which is entered once the run may begin.
    resume: go on from the newest checkpoint; begin where there is no run yet, and do nothing where it is finished under
    the same settings; train.epochs, max_steps and max_minutes may be others by now. show: progress on the terminal.
    ranks: entered, if the caller has already met those that this process was started with, as torchrun does; they share
    the batches of a step, and rank 0 alone writes and shows.
    Raises ConfigError for settings that cannot work, and when another process trains in the same output; what
    `Subscriber`, `prepare` and `loop.train` raise; PeerError when another rank ends.
    """
    if ranks is None:
        with Ranks.launched() as ranks:
            return train_draft(
                config, host=host, resume=resume, interrupt=interrupt, show=show and ranks.leads, ranks=ranks
            )
    settle = by_target(config)
    first = settle("")
    device = check(first, ranks.launch)
    if ranks.size > 1:
        on_device(device)
    directory = output_of(first)
    with owned(directory.path) if ranks.leads else contextlib.nullcontext():
        begun, done = ranks.decide("begin", partial(_begun, directory, settle, device, resume, ranks))
        if done is not None:
            return TrainedRun(directory.path, directory.draft, done, was_finished=True, ranks=ranks.size)
        see_init(first)
        with host if isinstance(host, AbstractContextManager) else contextlib.nullcontext(host) as local:
            return _train(settle, first, device, directory, local, begun, interrupt or Interrupt(), show, ranks)


def _begun(directory: RunDirectory, settle: Settle, device: str, resume: bool, ranks: Ranks) -> tuple[bool, int | None]:
    """Whether there is a run to go on with, and how many steps it has if it is finished.

    A run that its launcher starts again goes on.
    """
    again = ranks.restarts > 0 and directory.began_by(launcher.identity())
    begun = directory.check(resume or again)
    return begun, len(read(directory.journal)) if begun and is_finished(directory, settle, device) else None


def _train(
    settle: Settle,
    first: RunConfig,
    device: str,
    directory: RunDirectory,
    host: LocalDaemon | None,
    resume: bool,
    interrupt: Interrupt,
    show: bool,
    ranks: Ranks,
) -> TrainedRun:
    """The run itself, in a directory that rank 0 owns."""
    method = registry.load(first.method)
    recipes: dict[str, tuple[RunConfig, Config]] = {}

    def recipe(contract: TargetContract) -> tuple[RunConfig, Config]:
        """Settings for a target, checked when it is first met: later sessions find the data file gone, perhaps."""
        if contract.fingerprint not in recipes:
            known = settle(contract.model)
            recipes[contract.fingerprint] = known, check_recipe(known, contract.model)
        return recipes[contract.fingerprint]

    def wanted(contract: TargetContract) -> CaptureSpec:
        return method.capture(recipe(contract)[1], contract)

    def sent(contract: TargetContract) -> CaptureSpec:
        return travelling(recipe(contract)[0], wanted(contract))

    def read_as(contract: TargetContract) -> StateDtype:
        return wanted(contract).dtype

    with contextlib.ExitStack() as stack:
        keeping: Keeping = "home" if first.data.packing == "fixed" else "anywhere"
        subscriber = stack.enter_context(
            _connect(first, sent, read_as, device, directory.path.name, host, ranks, keeping)
        )
        contract = subscriber.contract
        known, draft = recipe(contract)
        if (idle := launcher.check_shares(known.train.accumulation, ranks.size)) and ranks.leads:
            logger.warning("%s", idle)
        if ranks.leads:
            warn_of_packing(known, subscriber)
        settled = with_data(with_dtype(known, device), contract.model)
        settled = replace(settled, output=str(directory.path))
        again = ranks.decide("again", lambda: resume and directory.has_checkpoint(settled.train.save_every))
        told = ranks.decide("settings", lambda: msgspec.to_builtins(directory.settings() if resume else None))
        before = None if told is None else convert(told, RunConfig, "run.json")
        if settled.train.threads:
            torch.set_num_threads(settled.train.threads)
        with tempfile.TemporaryDirectory(prefix="specd-target-") as scratch:
            files = target_files(contract, subscriber.artifact, Path(scratch))
            settled = with_date(settled, draft, before, Path(scratch), ranks)
            settled, draft, dataset, held = ranks.in_turn("data", partial(
                prepared,
                settled,
                draft,
                Path(scratch),
                contract.vocab_size,
                contract.model,
                consecutive_labels=method.consecutive_labels,
                begun=before,
                show=show,
            ))  # fmt: skip
            eos = ends_of(Path(scratch)) if settled.validation.decode_every else []
            images = ImagePayloads(dataset, Path(scratch), contract) if dataset.illustrated else None
        if images:
            images.check(contract, subscriber.rings.values(), settled.data.batch_tokens)
        batches = dataset.plan(settled.data, settled.train.seed, held.samples)
        if settled.data.packing == "fixed":
            subscriber.tell_epoch(batches.num_batches(0))
        loader = Loader(dataset, batches, epochs=settled.train.epochs, payloads=images)
        validation = measurements(settled, dataset, held, batches, directory.validation)
        own = identity(settled, draft, method.free, contract, dataset.digest)
        ranks.agree(launcher.facts(own, device, settled.train.collectives))
        checkpoints = Checkpoints(directory.checkpoints, own, settled.train.keep)
        old = checkpoints if again else None
        spent_s = partial(spent, directory.journal)
        plan = Plan(**ranks.decide("plan", lambda: planned(old, loader, settled.train, spent_s)._asdict()))
        steps, done = plan.steps, plan.done
        subscriber.check_slots(longest(loader, validation.places, plan, settled.train.accumulation))
        patience, wait = settled.train.peer_patience_s, first.subscriber.timeout_s + first.subscriber.connect_s + 60
        ranks.join(device, wait, collectives=settled.train.collectives, patience_s=patience)
        dtype: torch.dtype = getattr(torch, settled.train.dtype)
        try:
            published = json.loads(files["config.json"])
            warn_of_length(int(dataset.lengths.max()), published, contract.model)
            parts = target_parts(subscriber, published, dataset, held)
            objective = method.objective(draft, parts, device, dtype, settled.train.seed)
            objective.warm_up(getattr(torch, subscriber.dtype))
        except torch.OutOfMemoryError as error:
            what = f"no memory left on {device} for the draft and what it needs of {contract.model}"
            raise out_of_memory(what, error, "free some there or name another GPU in train.device") from None

        def export(path: Path, step: int, of: int = steps) -> None:
            objective.export(path, {name: data for name, data in files.items() if name not in TARGETS_OWN})
            sign(path, facts, step, of)

        if settled.validation.decode_every and ranks.leads:
            source = stack.enter_context(_beside(first, subscriber, device, directory.path.name, host))
            validation.decoder = decoder(
                settled.validation, source, parts, dataset, held, eos, device=device, run=directory.path
            )
        if ranks.leads:
            if again:
                facts = directory.reopen(settled, plan.change)
            else:
                facts = _facts(
                    settled, method.title, contract, dataset, held, objective, subscriber.stats().transports, ranks
                )
                write_facts(directory.path, facts)
            checkpoints.export = export
        sinks: list[Sink] = []
        if show and ranks.leads:
            title = f"{settled.method} draft for {contract.model} → {directory.path}{ranks.title}{subscriber.title}"
            shown = Display(
                title,
                done,
                steps,
                lambda: subscriber.stats().transports,
                limit=TimeLimit(settled.train.max_minutes, spent_s(done)),
                checkpoints=directory.checkpoints,
                device=device,
                keeps=subscriber.replay is not None,
                in_share=bool(first.subscriber.share),
            )
            sinks.append(stack.enter_context(shown))
        if ranks.leads:
            sinks += stack.enter_context(opened(settled, directory, contract.model, done, steps))
        end = train(
            settled.train,
            objective,
            loader,
            subscriber,
            checkpoints,
            directory.journal,
            sinks=sinks,
            interrupt=interrupt,
            resume=again,
            ranks=ranks,
            validation=validation,
        )
        if not ranks.leads:
            return TrainedRun(directory.path, directory.draft, end.step, ranks=ranks.size)
        tell_unless_trained(read(directory.journal), contract.model)
        step = end.step
        if settled.validation.patience and (best := checkpoints.best()) is not None:
            checkpoints.load_weights(best, objective.module)
            step = checkpoints.compare(best).position.step
            logger.info("the draft is that of %s, which has the lowest held-out loss", best)
        with interrupt.shield():
            export(directory.draft, step, steps if validation.ended else end.step)
            directory.finish()
    return TrainedRun(directory.path, directory.draft, len(read(directory.journal)), ranks=ranks.size)


def _connect(
    first: RunConfig,
    spec: CaptureSpec | Callable[[TargetContract], CaptureSpec],
    dtype: Callable[[TargetContract], StateDtype] | None,
    device: str,
    name: str,
    host: LocalDaemon | None,
    ranks: Ranks,
    keeping: Keeping,
) -> Subscriber:
    """The source of states: a daemon within this process is this rank's alone. spec, dtype: as of Subscriber."""
    link, launch = first.subscriber, ranks.launch
    if ranks.size > 1:
        name = f"{name}, rank {ranks.rank}"
    if host is not None:
        link = replace(link, endpoints=(host.endpoint,), transport=transports.WITHIN_PROCESS)
        return Subscriber(link, spec, dtype=dtype, device=device, name=name, context=host.context, keeping=keeping)
    seat = Seat(launch.rank, launch.local, launch.here) if ranks.size > 1 else None
    return Subscriber(
        link,
        spec,
        dtype=dtype,
        device=device,
        name=name,
        run=ranks.run,
        ranks=ranks.size,
        seat=seat,
        keeping=keeping,
    )


def _beside(first: RunConfig, subscriber: Subscriber, device: str, name: str, host: LocalDaemon | None) -> Subscriber:
    """A source of the same states and the final ones, for decoding: nobody asks for them again, nor shares them.

    Never rounded, as what a target writes is not.
    """
    own = replace(first, subscriber=replace(first.subscriber, depth=0, borrow=False, share=""))
    spec = replace(subscriber.spec, final=True, dtype=subscriber.dtype)
    return _connect(own, spec, None, device, f"{name}, decoding", host, Ranks(), "nowhere")


def _facts(
    config: RunConfig,
    title: str,
    contract: TargetContract,
    dataset: Dataset,
    held: Held,
    objective: Objective,
    transports: dict[str, str],
    ranks: Ranks,
) -> RunFacts:
    return RunFacts(
        started=utc(),
        launcher=launcher.identity() if ranks.size > 1 else "",
        target={
            "model": contract.model,
            "revision": contract.revision or f"weights {contract.weights}",
            "layers": contract.num_layers,
            "hidden size": contract.hidden_size,
            "vocabulary": contract.vocab_size,
            "dtype": contract.dtype,
            "fingerprint": contract.fingerprint,
        },
        draft={"method": title, **objective.facts()},
        data=data_facts(config.data.path, dataset, held),
        transports=transports,
        machine=machine_facts() | ({"ranks": ranks.title.removeprefix(" · ")} if ranks.size > 1 else {}),
        config=msgspec.to_builtins(config),
        directory=os.getcwd(),
    )
