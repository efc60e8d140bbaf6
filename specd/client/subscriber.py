"""The subscriber: a trainer's source of hidden states, over any number of daemons, in order and exactly once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Self

import torch
import zmq

from specd.client.fetch import Item
from specd.client.handshake import Terms
from specd.client.inflight import InFlight
from specd.client.line import identity
from specd.client.peers import Keeping
from specd.client.pending import Pending, place_of
from specd.client.seats import Seat, narrow, roles, thin
from specd.client.states import States
from specd.config.settings import SubscriberConfig
from specd.endpoints import resolve_endpoint
from specd.errors import ConfigError, DaemonError
from specd.memory import cuda
from specd.metrics import Stats
from specd.protocol.batch import Batch, Delivery, batch_id, slot_layout
from specd.protocol.capture import CaptureSpec, StateDtype
from specd.protocol.contract import RingInfo, TargetContract

log = logging.getLogger(__name__)


class Subscriber:
    """A trainer's source of hidden states.

    spec: what to capture, or a function that gives it for the target. dtype: a function that gives what float8 states
    are delivered in; without it, the target's. device: where deliveries go. fingerprint: the target it must be, empty
    for any. payloads: names of the arrays that batches bring for the target beside their tokens
    (`specd.protocol.payload`). context: of embedded daemons. run: 16 bytes that are equal on all `ranks` of one
    training, each of which has a subscriber; empty for one alone. seat: which of them this is, for `subscriber.place`;
    without it, every daemon is taken. keeping: which daemon may keep a batch's states over epochs, of those that do so:
    the one that made them (`anywhere`), always the same one (`home`), for batches that come again, or none (`nowhere`).
    Raises DaemonError when no daemon is reached within `connect_s`, RejectedError when one refuses, TransportError when
    the transport asked for cannot be used, ConfigError for keys that cannot be.

    contract: of the target all its daemons serve. spec: what is captured. dtype: of deliveries. ring: of the first
    daemon met. thin: what is wrong with that ring for so many ranks of this depth, empty if nothing. sharing: how many
    other runs that daemon had in `subscriber.share`. replay: what that daemon keeps over epochs, None for nothing.
    stands_by: whether some daemons are those of other ranks, and asked only while none of its own is up.
    """

    def __init__(
        self,
        config: SubscriberConfig,
        spec: CaptureSpec | Callable[[TargetContract], CaptureSpec],
        *,
        dtype: Callable[[TargetContract], StateDtype] | None = None,
        device: str = "cpu",
        fingerprint: str = "",
        payloads: tuple[str, ...] = (),
        name: str = "trainer",
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        run: bytes = b"",
        ranks: int = 1,
        seat: Seat | None = None,
        keeping: Keeping = "anywhere",
    ) -> None:
        if config.depth < 0 or not config.endpoints:
            raise ConfigError(f"depth {config.depth} and endpoints {config.endpoints}: need depth ≥ 0 and an endpoint")
        self._depth = config.depth
        self._closed = False
        self._owner: object = None
        trainer = identity(config.auth, config.endpoints)
        self._own_context = context is None
        self._context = zmq.Context() if context is None else context
        spec_for = spec if callable(spec) else lambda contract: spec
        # A borrowed slot takes its credit until its batch is trained, not only fetched.
        credits = config.depth + (2 if config.borrow else 1)
        terms = Terms(
            name=name,
            spec=spec_for,
            credits=credits,
            transport=config.transport,
            device=cuda.resolve(device),
            borrow=config.borrow,
            fingerprint=fingerprint,
            identity=trainer,
            insecure_data=config.insecure_data,
            payloads=payloads,
            run=run,
            share=config.share,
        )
        endpoints = [resolve_endpoint(endpoint) for endpoint in config.endpoints]
        daemons = roles(endpoints, ranks, seat, near=config.place == "near")
        self._in_flight = InFlight(config, terms, self._context, daemons, keeping)
        try:
            session = self._in_flight.first_session()
        except BaseException:
            self.close()
            raise
        self._share = config.share
        self.sharing = session.welcome.sharing
        self.replay = session.welcome.replay
        self.stands_by = any(each.standby for each in daemons)
        self.contract: TargetContract = session.welcome.contract
        self.ring: RingInfo = session.welcome.ring
        self.spec: CaptureSpec = session.spec
        read_as = dtype(self.contract) if dtype else self.contract.dtype
        self._states = States(self.spec, self.contract.hidden_size, read_as, terms.device)
        self.dtype = self._states.dtype
        come = daemons[endpoints.index(session.endpoint)].ranks
        self.thin = thin(self.ring.num_slots, session.welcome.slots - 1, credits, come)
        if self.thin and (ranks == 1 or (seat is not None and seat.rank == 0)):
            log.warning("%s: %s", session.endpoint, self.thin)
        if config.borrow:
            log.info("at most %d batches in flight, read in the daemon's slots", config.depth + 1)
        else:
            log.info(
                "at most %d batches in flight, %.1f MiB of staging buffers",
                config.depth + 1,
                (config.depth + 2) * self.ring.slot_bytes / 2**20,
            )

    def stream(self, batches: Iterable[Batch]) -> Generator[Delivery, None, None]:
        """Yield every batch with its states, in order, each exactly once.

        While one delivery is in use, the next `depth` are in flight. Raises BatchError for a batch that cannot be
        captured, or fits no daemon's slots; DaemonError when one does not come within `timeout_s`, no daemon is
        left for `connect_s`, or the subscriber is closed before the end; ConfigError while another stream is open;
        RejectedError, ProtocolError or TransportError when a daemon refuses the trainer, breaks the protocol, or
        overwrote a borrowed slot.
        """
        source, stream = iter(batches), object()
        try:
            while True:
                self._check_open()
                self._claim(stream)
                self._extend(source, self._depth + 1)
                if not self._in_flight:
                    return
                pending = self._in_flight.take()
                try:
                    self._extend(source, self._depth)
                    assert pending.buffer is not None
                    yield Delivery(pending.batch, **self._states.of(pending.buffer, pending.layout))
                finally:
                    self._in_flight.give_back(pending)
        finally:
            if self._owner is stream:
                self._in_flight.drop()

    def tell_epoch(self, batches: int) -> None:
        """Tell daemons how many batches of this run come until one comes again.

        They then keep what may still be asked for. Without it a small store takes them for forgotten after four times
        as many batches as it holds.
        """
        self._in_flight.tell_epoch(batches)

    @property
    def rings(self) -> dict[str, RingInfo]:
        """Of all daemons that are up, by endpoint; empty while one that may bring batches is not."""
        return self._in_flight.rings()

    def check_slots(self, longest: int, *, shared: bool = False) -> None:
        """Raise ConfigError where a batch of `longest` tokens fits no daemon's slots, as far as they are known.

        shared: as in a share, whose slots hold what others want, too.
        """
        shared = shared or bool(self._share)
        hidden, rings = self.contract.hidden_size, self.rings
        need = slot_layout(self.spec, hidden, longest).nbytes
        if rings and not any(
            need <= ring.slot_bytes and (longest <= ring.slot_tokens or not shared) for ring in rings.values()
        ):
            widest = max(rings, key=lambda endpoint: rings[endpoint].slot_bytes)
            problems, remedy = narrow(rings[widest], self.spec, hidden, longest)
            given = " ".join(f"--set {setting}" for setting in remedy)
            raise ConfigError(
                f"{widest}: {'; '.join(problems)}: start the daemon with {given}, or train with a smaller "
                f"data.batch_tokens"
            )

    def artifact(self, name: str) -> bytes:
        """The bytes of one artifact of the target.

        Raises ConfigError for a name the target does not offer, DaemonError when they do not come within `timeout_s` or
        the subscriber is closed.
        """
        self._check_open()
        ref = self.contract.artifacts.get(name)
        if ref is None:
            offers = ", ".join(sorted(self.contract.artifacts))
            raise ConfigError(f"the target has no artifact {name!r}; it has {offers}")
        return bytes(self._in_flight.artifacts.read(ref.same_as or name, ref.nbytes))

    def tensor(self, name: str) -> torch.Tensor:
        """One artifact that is a tensor, such as `embedding` [V, H] or `lm_head` [V, H], in the target's dtype."""
        data = bytearray(self.artifact(name))
        ref = self.contract.artifacts[name]
        return torch.frombuffer(data, dtype=getattr(torch, ref.dtype)).view(ref.shape)

    @property
    def title(self) -> str:
        """What a run's title says of its share; empty without one."""
        runs = "1 run" if self.sharing == 1 else f"{self.sharing} runs"
        return f" · shares forwards with {runs} so far ({self._share})" if self._share else ""

    def stats(self) -> Stats:
        """Counters since the start."""
        return self._in_flight.stats()

    def close(self) -> None:
        """End every session and thread. Idempotent."""
        self._closed = True
        self._in_flight.close()
        if self._own_context:
            self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Subscriber({self._in_flight})"

    def _check_open(self) -> None:
        if self._closed:
            raise DaemonError("the subscriber is closed: open another one to go on")

    def _claim(self, stream: object) -> None:
        """What is in flight from now on is this stream's. Raises ConfigError while anything is another's."""
        if self._in_flight and self._owner is not stream:
            raise ConfigError("another stream of this subscriber is open; close it, or open a subscriber for each")
        self._owner = stream

    def _extend(self, source: Iterator[Batch], size: int) -> None:
        """Draw batches from the loader until `size` are in flight."""
        fresh: list[Item] = []
        while len(self._in_flight) + len(fresh) < size and (batch := next(source, None)) is not None:
            layout = slot_layout(self.spec, self.contract.hidden_size, batch.num_tokens)
            identity = batch_id(self.contract.fingerprint, batch.tokens, batch.lengths, batch.payloads)
            fresh.append(Pending(batch, identity, layout, self.spec, place_of(batch)))
        if fresh:
            self._in_flight.submit(fresh)
