"""A command in one of several processes of a launcher: what each says, and how all end."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import typer

from specd import log
from specd.errors import PeerError, SpecdError

if TYPE_CHECKING:
    from specd.train.distributed import Ranks
    from specd.train.interrupt import Interrupt


def is_one_of_several() -> bool:
    """Whether torchrun or another launcher started this process beside others."""
    size = os.environ.get("WORLD_SIZE", "").strip()
    return size.isdecimal() and int(size) > 1


def as_rank(work: Callable[[Ranks, Interrupt], None], interrupted: Callable[[], str]) -> None:
    """Do `work` as one rank: rank 0 says what there is to say, once, and all end together.

    interrupted: what rank 0 says of a run that a signal ends. Does not return when the run fails: what torch's process
    groups still hold would wait for the other ranks at the end of the process.
    """
    from specd.train.distributed import Ranks
    from specd.train.interrupt import Interrupt
    from specd.train.peers import exit_code

    try:
        with Interrupt() as interrupt:
            ranks = Ranks.launched()
            _log_as(ranks.rank)
            with ranks:
                work(ranks, interrupt)
    except KeyboardInterrupt:
        _end(130, interrupted())
    except PeerError as error:
        _end(error.code, "" if error.said else f"specd: error: {error}")
    except SpecdError as error:
        _end(exit_code(error), "\n".join([f"specd: error: {error}", *getattr(error, "__notes__", ())]))
    except Exception:  # noqa: BLE001  # it is shown as Python does, without the end of Python
        _end(1, traceback.format_exc().rstrip())


def _end(code: int, said: str) -> NoReturn:
    with contextlib.suppress(OSError):  # whoever reads it may be gone
        if said and log.as_json():
            logging.getLogger("specd").error("%s", said.removeprefix("specd: error: "))
        elif said:
            typer.echo(said, err=True)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _log_as(rank: int) -> None:
    """Have every rank but the first log what is wrong, and who says so."""
    logger = logging.getLogger("specd")
    if not rank:
        return
    if logger.level == logging.INFO:
        logger.setLevel(logging.WARNING)
        os.environ[log.LEVEL] = logging.getLevelName(logging.WARNING)
    for handler in logger.handlers:
        handler.setFormatter(log.formatter(f"rank {rank}:"))
