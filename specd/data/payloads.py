"""What samples with images bring for their target, made ahead of training on threads of its own."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from msgspec.structs import replace

from specd.data.dataset import Dataset
from specd.data.images import NAMES, Processor
from specd.errors import ConfigError
from specd.protocol.batch import Batch
from specd.protocol.contract import RingInfo, TargetContract

AHEAD = 2
"""Batches whose images are read while those before them are trained."""
THREADS = 4


class ImagePayloads:
    """The payloads of a data set's samples. Only a few batches' are in memory."""

    def __init__(self, dataset: Dataset, directory: Path, contract: TargetContract) -> None:
        """directory: the target's files. Raises DataError as `Processor`."""
        self._dataset = dataset
        self._dtype = contract.dtype
        self._processor = Processor(directory)

    def check(self, contract: TargetContract, rings: Iterable[RingInfo], batch_tokens: int) -> None:
        """Raise ConfigError where the target takes no images, or no daemon as many as a batch may have.

        rings: of all daemons, none where they are not known.
        """
        samples = f"{self._dataset.report.illustrated:,} samples have images"
        if missing := sorted(set(NAMES) - set(contract.payloads)):
            takes = f"takes no {', '.join(missing)}" if contract.payloads else "takes text alone here"
            raise ConfigError(
                f"{samples}, and {contract.model} {takes}: train on text, or start the daemon with a target that takes "
                f"images (--backend transformers)"
            )
        need = batch_tokens * self._processor.bytes_per_token(contract.dtype)
        if need > (most := max((ring.payload_bytes for ring in rings), default=need)):
            mib = -(-need >> 20)
            raise ConfigError(
                f"{samples}, of which a batch of data.batch_tokens={batch_tokens} may bring {mib} MiB, and a daemon "
                f"takes {most >> 20} (ring.payload_mib): start it with --set ring.payload_mib={mib} (at "
                f"most 256), or lower data.batch_tokens"
            )

    def of(self, sample: int) -> bytes:
        """What sample number `sample` brings; empty for text alone. Raises DataError for an image that has changed."""
        pictures = self._dataset.pictures(sample)
        return self._processor.payload(pictures, self._dataset.tokens(sample), self._dtype) if pictures else b""

    def beside(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with what their samples bring."""
        waiting: deque[tuple[Batch, list[Future[bytes]]]] = deque()
        with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1), "specd-images") as pool:
            try:
                for batch in batches:
                    waiting.append((batch, [pool.submit(self.of, sample) for sample in batch.samples]))
                    if len(waiting) > AHEAD:
                        yield _whole(*waiting.popleft())
                while waiting:
                    yield _whole(*waiting.popleft())
            finally:
                for _, made in waiting:
                    for each in made:
                        each.cancel()


def _whole(batch: Batch, made: list[Future[bytes]]) -> Batch:
    payloads = tuple(each.result() for each in made)
    return replace(batch, payloads=payloads) if any(payloads) else batch
