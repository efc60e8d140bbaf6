"""What does keeping states cost a daemon's trainers, and how fast are those that are read instead of computed?

Rounds of one daemon, each twice, with other batches: once with its states kept and once without, in turns, so that a
ratio is one of neighbours in time. Afterwards what was kept is asked for again.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from specd.bench.pipeline import apart
from specd.bench.pipeline.processes import daemon
from specd.bench.pipeline.settings import Settings, short_batches
from specd.bench.pipeline.step import clock
from specd.client.peers import Keeping
from specd.client.subscriber import Subscriber
from specd.config.settings import ReplayConfig, SubscriberConfig
from specd.protocol.batch import Batch
from specd.transports.registry import load

QUIET_S = 2.0
"""A disk that is still writing counts a batch more often than that: one of 60 MB takes 0.3 s at 0.2 GB/s."""


class Behind(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon that keeps states. step_ms: of a trainer that is busy so long with each batch, 0 for one that is never.

    tokens: of a batch. computed: tokens/s of rounds whose batches were not kept, the median; kept: of those that were.
    ratio: kept over computed, round by round, the median; low, high: a 95 % interval of it, by resampling rounds.
    written: batches, gb: 10⁹ bytes of them; write: GB/s while batches were kept. skipped: share of those that were to
    be kept. replayed: tokens/s of what was kept, asked for again; hits: share of it that was read.
    """

    target: str
    step_ms: float
    tokens: int
    rounds: int
    computed: float
    kept: float
    ratio: float
    low: float
    high: float
    written: int
    gb: float
    write: float
    skipped: float
    replayed: float
    hits: float
    by_round: tuple[tuple[float, float], ...]


def behind(
    settings: Settings,
    replay: ReplayConfig,
    *,
    rounds: int,
    count: int,
    step_ms: float = 0.0,
    progress: Callable[[str], None] = lambda line: None,
) -> Behind:
    """Measure `rounds` rounds of twice `count` batches. Raises SpecdError when the daemon does not come up."""
    config = msgspec.structs.replace(settings.daemon(settings.devices[0], settings.slots), replay=replay)
    with (
        tempfile.TemporaryDirectory(prefix="specd-", dir="/tmp") as name,
        daemon(config, Path(name, "d.sock")) as endpoint,
    ):
        found = _Rounds(settings, endpoint, step_ms)
        found.stream("nowhere", found.drawn(count))  # warm-up
        pairs: list[tuple[float, float]] = []
        wrote_s = 0.0
        kept: list[Batch] = []
        for number in range(rounds):
            progress(f"round {number + 1} of {rounds}")
            rates: dict[Keeping, float] = {}
            for keeping in ("nowhere", "anywhere") if number % 2 else ("anywhere", "nowhere"):
                batches = found.drawn(count)
                begin = time.perf_counter()
                rates[keeping] = found.stream(keeping, batches)
                if keeping == "anywhere":
                    wrote_s += time.perf_counter() - begin
                    kept += batches
            pairs.append((rates["nowhere"], rates["anywhere"]))
        counts = found.counts()
        progress("once more")
        again = random.Random(0).sample(kept, len(kept))
        replayed = found.stream("nowhere", again)
        after = found.counts()
        ratios = [b / a for a, b in pairs]
        low, high = _interval(ratios)
        written, skipped = counts["replay_wrote"], counts["replay_skipped"]
        gb = written * found.batch_bytes / 1e9
        return Behind(
            target=settings.model,
            step_ms=step_ms,
            tokens=settings.short,
            rounds=rounds,
            computed=round(statistics.median(a for a, _ in pairs), 1),
            kept=round(statistics.median(b for _, b in pairs), 1),
            ratio=round(statistics.median(ratios), 4),
            low=low,
            high=high,
            written=written,
            gb=round(gb, 2),
            write=round(gb / wrote_s, 3),
            skipped=round(skipped / max(1, written + skipped), 4),
            replayed=round(replayed, 1),
            hits=round((after["replay_hit"] - counts["replay_hit"]) / max(1, written), 4),
            by_round=tuple((round(a, 1), round(b, 1)) for a, b in pairs),
        )


class _Rounds:
    """Streams to a trainer that does nothing but wait `step_ms` a batch."""

    def __init__(self, settings: Settings, endpoint: str, step_ms: float) -> None:
        self._settings, self._endpoint, self._step_s = settings, endpoint, step_ms / 1e3
        self._depth = settings.fed(settings.short)
        self._nonce = 0
        with self._subscriber("nowhere") as link:
            self._vocab = link.contract.vocab_size
            self.batch_bytes = settings.short * link.spec.bytes_per_token(link.contract.hidden_size)

    def drawn(self, count: int) -> list[Batch]:
        """Batches that nobody has asked for."""
        self._nonce += 1
        return short_batches(self._settings, self._vocab, 1, count, self._nonce)

    def stream(self, keeping: Keeping, batches: Sequence[Batch]) -> float:
        """Tokens a second of deliveries, without those while the queue fills."""
        edge = min(self._depth + 1, len(batches) // 4)
        with self._subscriber(keeping) as link:
            seconds = clock(self._slowly(link.stream(batches)), None, edge).seconds
        return self._settings.short * len(seconds) / sum(seconds)

    def counts(self) -> dict[str, int]:
        """The daemon's counters, once nothing was written for QUIET_S."""
        from specd.client.ask import ask_status

        before = -1
        while (now := ask_status(self._endpoint, 30).counters)["replay_wrote"] != before:
            before = now["replay_wrote"]
            time.sleep(QUIET_S)
        return now

    def _slowly(self, deliveries: Any) -> Any:
        for delivery in deliveries:
            if self._step_s:
                time.sleep(self._step_s)
            yield delivery

    def _subscriber(self, keeping: Keeping) -> Subscriber:
        settings, transport = self._settings, self._settings.transports[0]
        link = SubscriberConfig(
            endpoints=(self._endpoint,),
            transport=transport,
            depth=self._depth,
            borrow=settings.shared and load(transport).traits.borrow,
            connect_s=apart.CONNECT_S,
            timeout_s=apart.CONNECT_S,
        )
        return Subscriber(link, settings.capture, device=settings.trainer, name="bench", keeping=keeping)


def _interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % of the medians of rounds drawn anew."""
    drawn = np.random.default_rng(0).choice(np.asarray(ratios), (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5)).tolist()
    return round(low, 4), round(high, 4)
