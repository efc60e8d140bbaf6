"""A target that is hosted in the trainer's own process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from msgspec.structs import replace

from specd.cli.settings import hosting_config
from specd.config.settings import Config, RunConfig, SubscriberConfig, TargetConfig
from specd.errors import ConfigError
from specd.transports.registry import WITHIN_PROCESS

if TYPE_CHECKING:
    from specd.targets.source import Source
    from specd.train.distributed import Ranks
    from specd.train.trainer import LocalDaemon


def check_link(link: SubscriberConfig, model: str) -> None:
    """Raise ConfigError for settings of a connection to a daemon, which hosting `model` here would ignore."""
    if link.endpoints != SubscriberConfig().endpoints:
        raise ConfigError(
            f"--model {model} hosts the target here, --endpoint {link.endpoints[0]} uses a daemon: give one"
        )
    if link.share:
        raise ConfigError(
            f"share {link.share!r}: expected none, as --model {model} hosts the target for this run alone; leave it "
            f"out, or give --endpoint of a daemon that others train from, too"
        )
    if link.transport not in ("auto", WITHIN_PROCESS):
        raise ConfigError(
            f"transport {link.transport!r}: expected auto or {WITHIN_PROCESS}, as --model {model} hosts the target "
            f"here; leave it out, or give --endpoint of a daemon in place of --model"
        )


def hosted(
    run: RunConfig, model: str, preset: str, resume: bool, ranks: Ranks | None = None
) -> AbstractContextManager[LocalDaemon]:
    """Check all settings; the context then hosts `model` in this process, of several ranks on this one's device."""
    from specd.daemon.serve import embedded
    from specd.train.asked import check, check_recipe, output_of

    if ranks is not None:
        run = replace(run, train=replace(run.train, device=check(run, ranks.launch)))
    daemon = hosting_config(run, model, preset=preset)
    draft = check_recipe(run, model)
    if not (resume and output_of(run).begun):  # a run that goes on keeps its mask token
        _check_mask(draft, daemon.target)
    return embedded(daemon)


def _check_mask(draft: Config, target: TargetConfig) -> None:
    """Raise ConfigError for a mask token that will not do, or when none can be chosen, before the target is loaded."""
    from specd.data.samples import vocabulary
    from specd.targets.source import resolve, with_tokenizer
    from specd.train.preparation import check_mask, mask_of

    if mask_of(draft) is None:
        return
    try:
        found = resolve(target.model, need="shape" if target.load_format == "dummy" else "tokenizer")
        source = with_tokenizer(found, target.tokenizer)
    except ConfigError:  # not of a checkpoint: what its backend says of it is said by the trainer
        return
    with laid_out(source) as files:
        check_mask(draft, files, vocabulary(files), target.model)


@contextmanager
def laid_out(source: Source) -> Iterator[Path]:
    """A directory with config.json and the tokenizer's files of a target, as its daemon gives them to trainers."""
    with TemporaryDirectory(prefix="specd-target-") as scratch:
        for name, data in ({"config.json": json.dumps(source.config).encode()} | source.files()).items():
            (Path(scratch) / name).parent.mkdir(exist_ok=True)
            (Path(scratch) / name).write_bytes(data)
        yield Path(scratch)
