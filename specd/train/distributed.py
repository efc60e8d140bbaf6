"""The ranks of a data-parallel run: how they meet, what each trains, what they exchange, and how they end together.

Batch k of an optimizer step is trained by rank k mod W. Gradients are sums, divided once by the weight of the whole
step, and the sums of all batches are added up in the order of the plan on every rank: the numbers of a run do not
depend on W, but for the order in which gradients are summed.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import torch
import torch.distributed

from specd.config.settings import Collectives
from specd.errors import ConfigError, PeerError, SpecdError, first_line
from specd.memory import cuda
from specd.train.gradients import Gradients, exchanged
from specd.train.launcher import Launch, launched
from specd.train.meeting import MEET_S, POLL_S, meet, put, read
from specd.train.peers import HEARD, Ending, Member, Watch, exit_code, tell

logger = logging.getLogger(__name__)

distributed: Any = torch.distributed  # not all of it is exported for checkers
Value = TypeVar("Value")
REASON_S: Final = 1.0
"""How long a rank that was signalled, or met a broken connection, waits to hear of a reason."""
STARTING_S: Final = 60.0
"""How long a rank may show no life before the first step: what it loads may hold the interpreter."""
_LEFT: Final[list[Any]] = []
"""Groups with exchanges under way: their end would wait for the ranks that they have lost."""


class Ranks:
    """This rank among those of a run; a context manager, which others end with. One rank alone costs nothing.

    store: the launcher's, None for one rank alone.
    """

    def __init__(self, launch: Launch | None = None, store: Any = None) -> None:
        self.launch = launch or Launch()
        assert (self.launch.size > 1) == (store is not None), "several ranks meet in a store"
        self.rank, self.size = self.launch.rank, self.launch.size
        self._store = store
        self.members: list[Member] = []
        self.run = b""
        """16 bytes that all ranks of a run share."""
        self._watch: Watch | None = None
        self._group: Any = None
        self._nccl = False
        self._alive = torch.ones(1, dtype=torch.float32)
        self._device = "cpu"

    @classmethod
    def launched(cls) -> Self:
        """This process among those of its launcher. Raises ConfigError where they cannot meet."""
        if (found := launched()).size == 1:
            return cls()
        try:
            store, _, _ = next(distributed.rendezvous("env://", timeout=datetime.timedelta(seconds=MEET_S)))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"rank {found.rank} of {found.size} does not reach the others at {os.environ['MASTER_ADDR']}:"
                f"{os.environ['MASTER_PORT']} ({first_line(error)}): see that this address is right on every host"
            ) from None
        return cls(found, store)

    def __repr__(self) -> str:
        return f"Ranks({self.rank} of {self.size})"

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes and prints."""
        return self.rank == 0

    @property
    def num_hosts(self) -> int:
        return len({member.host for member in self.members}) or 1

    @property
    def title(self) -> str:
        """What a line about the run adds; nothing for one rank alone."""
        hosts = self.num_hosts
        return f" · {self.size} ranks on {hosts} host{'s' * (hosts > 1)}" if self.size > 1 else ""

    @property
    def restarts(self) -> int:
        """How often the launcher has started the run again; each host's own count may lack some."""
        return max((member.restarts for member in self.members), default=0)

    def __enter__(self) -> Self:
        if self._store is not None:
            self._store, self.run, self.members = meet(self._store, self.launch)
            self._watch = Watch(self._store.clone(), self.members[self.rank], self.members, STARTING_S)
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        instead = self._leave(watch, error) if error is not None else None
        watch.close()
        group, self._group = self._group, None
        if error is not None:
            _LEFT.append(group)
        else:
            with contextlib.suppress(RuntimeError):  # the launcher may be gone, and so may we
                self._store.set(f"beat/{self.rank}", "done")
        if instead is not None:
            raise instead from error

    def _leave(self, watch: Watch, error: BaseException) -> PeerError | None:
        """Tell the others why this rank ends; what it says itself, if that is not `error`."""
        if isinstance(error, PeerError):
            return None
        if isinstance(error, KeyboardInterrupt):
            # A launcher signals the others when one ends, and may be faster than its reason.
            watch.wait(REASON_S)
            if (found := watch.error()) is not None and not found.interrupted:
                return found
        code = exit_code(error)
        reason = str(error) if isinstance(error, SpecdError) else f"{type(error).__name__}: {first_line(error)}"
        interrupted = isinstance(error, KeyboardInterrupt)
        ending = Ending(
            rank=self.rank,
            host=self.members[self.rank].host,
            kind="interrupt" if interrupted else "error",
            reason="it was interrupted" if interrupted else reason,
            code=code,
            teller=self.rank,
        )
        with contextlib.suppress(RuntimeError):
            tell(self._store, ending)
            if self.leads:
                self._store.set(HEARD, "")
        if self.leads or not isinstance(error, SpecdError | KeyboardInterrupt):
            return None
        return PeerError(reason, code=code, said=self._heard())

    def _heard(self) -> bool:
        """Whether rank 0 knows that the run ends, and will say why."""
        limit = time.monotonic() + REASON_S
        with contextlib.suppress(RuntimeError):
            while not self._store.check([HEARD]):
                if time.monotonic() > limit:
                    return False
                time.sleep(POLL_S)
        return True

    # Before the first step

    def decide(self, name: str, work: Callable[[], Value]) -> Value:
        """What rank 0 makes of `work`, plain data, on every rank; the others wait for it. `name` is used once."""
        if self.size == 1:
            return work()
        if self.leads:
            value = work()
            put(self._store, f"decided/{name}", value)
            return value
        found: Value = self._wait(f"decided/{name}")
        return found

    def in_turn(self, name: str, work: Callable[[], Value]) -> Value:
        """`work` of every rank: first of one on each host, whose files the others there find. `name` is used once."""
        if self.size == 1:
            return work()
        key = f"turn/{name}/{self.members[self.rank].host_id}"
        if self.launch.local:
            self._wait(key)
            return work()
        value = work()
        put(self._store, key, True)
        return value

    def agree(self, facts: Mapping[str, str]) -> None:
        """Raise ConfigError unless every rank has the same facts. Asked once."""
        if self.size == 1:
            return
        put(self._store, f"facts/{self.rank}", facts)
        found: list[dict[str, str]] = [self._wait(f"facts/{rank}") for rank in range(self.size)]
        for member, theirs in zip(self.members, found, strict=True):
            for name, value in theirs.items():
                if value != found[0].get(name):
                    raise ConfigError(
                        f"rank {member.rank} on {member.host} has {name} {value}, rank 0 on {self.members[0].host} "
                        f"{found[0].get(name)}: give all ranks the same {name}"
                    )

    def join(
        self, device: str, timeout_s: float, *, collectives: Collectives = "auto", patience_s: float = 0.0
    ) -> None:
        """Connect to the others for collectives. Raises ConfigError where that fails.

        device: of what is exchanged. timeout_s: of one exchange: longer than any rank may wait for its batch.
        patience_s: how long a rank may show no life from now on, 0 for 5 s on one host and 30 s on several.
        """
        if self.size == 1:
            return
        timeout = datetime.timedelta(seconds=timeout_s)
        self._device, self._nccl = device, collectives == "nccl" or (collectives == "auto" and device != "cpu")
        if self._nccl:
            self._check_devices(device)
        # Connections of its own: until all ranks are there, it holds them.
        meeting = distributed.PrefixStore("group", self._store.clone())
        try:
            self._group = self._patiently(partial(self._connected, meeting, timeout))
        except RuntimeError as error:
            self._check()
            raise ConfigError(
                f"rank {self.rank} cannot connect to the others over {'nccl' if self._nccl else 'gloo'} "
                f"({first_line(error)}): name the network interface in "
                f"{'NCCL' if self._nccl else 'GLOO'}_SOCKET_IFNAME"
            ) from None
        assert self._watch is not None, "entered"
        self._watch.patience_s = patience_s or (5.0 if self.num_hosts == 1 else 30.0)
        self._watch.at_end(self._abort)

    def _connected(self, meeting: Any, timeout: datetime.timedelta) -> Any:
        """A process group, once a first exchange has connected all."""
        if not self._nccl:
            if self.num_hosts == 1:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            return distributed.ProcessGroupGloo(meeting, self.rank, self.size, timeout)
        # Else a thread of torch ends the process when an exchange fails, before anything is saved.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
        torch.cuda.set_device(self._device)
        self._alive = self._alive.pin_memory()
        options = distributed.ProcessGroupNCCL.Options()
        options._timeout = timeout
        group = distributed.ProcessGroupNCCL(meeting, self.rank, self.size, options)
        group.allreduce([torch.zeros(1, dtype=torch.float32, device=self._device)]).wait()
        torch.cuda.synchronize(self._device)
        return group

    def _patiently(self, work: Callable[[], Value]) -> Value:
        """What `work` gives, which waits for other ranks and cannot be interrupted; on a thread, to be left behind."""
        assert self._watch is not None, "entered"
        outcome: Future[Value] = Future()

        def run() -> None:
            try:
                outcome.set_result(work())
            except BaseException as error:  # noqa: BLE001  # it is raised where it was asked for
                outcome.set_exception(error)

        threading.Thread(target=run, name="specd-connect-ranks", daemon=True).start()
        while not outcome.done():
            if self._watch.wait(POLL_S / 4):
                raise self._broken(None)
        return outcome.result()

    def _check_devices(self, device: str) -> None:
        """Raise ConfigError for two ranks on one GPU."""
        put(self._store, f"device/{self.rank}", cuda.uuid(device))
        seen: dict[str, int] = {}
        for rank in range(self.size):
            if (other := seen.setdefault(self._wait(f"device/{rank}"), rank)) != rank:
                raise ConfigError(
                    f"ranks {other} and {rank} on {self.members[rank].host} have one GPU, and nccl wants one each: "
                    f"start torchrun with --nproc-per-node {torch.cuda.device_count()}, or have them share it with "
                    f"train.collectives=gloo, which is slow"
                )

    def deal(self, step: Sequence[Value]) -> Sequence[Value]:
        """Which of a step's batches this rank trains; there may be none."""
        return step[self.rank :: self.size]

    # Collectives, which every rank makes in the same order

    def replicate(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every rank the values of rank 0, in place."""
        if self.size == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                self.finish([self._begin(partial(self._group.broadcast, tensor, 0))])

    def gradients(self, parameters: Sequence[torch.nn.Parameter]) -> Gradients:
        """The gradients of parameters, to be summed over all ranks."""
        return Gradients(parameters, self._sum if self.size > 1 else None)

    def gather(self, row: torch.Tensor, word: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of all ranks [W, n], float64; and whether the exchange was whole, a bool on the device.

        What was exchanged before is whole, too, then. word: not 0, another in each step. Over nccl the host goes on, so
        an exchange that is aborted later shows in no other way.
        """
        rows = torch.zeros(self.size, row.numel() + 1, dtype=torch.float64, device=row.device)
        rows[self.rank, 0] = word
        rows[self.rank, 1:] = row
        if self.size > 1:
            self.finish([self._sum([rows])])
        intact = (rows[:, 0] == word).all()
        if self._nccl:
            # Read when the stream comes to it: once `_abort` has begun, whatever the kernels before it left behind.
            intact = intact & (self._alive.to(row.device, non_blocking=True)[0] > 0)
        return rows[:, 1:], intact

    def finish(self, works: Sequence[Any]) -> None:
        """Wait for exchanges: on the host over gloo, on the current stream over nccl. Raises PeerError."""
        try:
            for work in works:
                if not self._nccl:
                    self._poll(work)
                work.wait()
        except RuntimeError as error:
            raise self._broken(error) from None

    def _sum(self, tensors: list[torch.Tensor]) -> Any:
        return exchanged(tensors, lambda one: self._begin(partial(self._group.allreduce, [one])))

    def _begin(self, exchange: Callable[[], Any]) -> Any:
        self._check()
        try:
            return exchange()
        except RuntimeError as error:
            raise self._broken(error) from None

    def _poll(self, work: Any) -> None:
        """Wait until an exchange is over, or the run: gloo itself waits for a lost peer until its time is up."""
        began = time.monotonic()
        assert self._watch is not None, "entered"
        while not work.is_completed():
            if time.monotonic() - began < 2e-4:
                time.sleep(0)
            elif self._watch.wait(5e-4):
                raise self._broken(None)

    # The end

    def part(self) -> None:
        """After the last exchange: disconnect, once every rank has had it."""
        if self._group is None:
            return
        with contextlib.suppress(PeerError, RuntimeError):  # whoever goes now takes nothing along
            put(self._store, f"parted/{self.rank}", True)
            for rank in range(self.size):
                self._wait(f"parted/{rank}")
        group, self._group = self._group, None
        if self._nccl:
            group.abort()

    def _check(self) -> None:
        """Raise PeerError when the run ends for a peer."""
        if self._watch is not None and (error := self._watch.error()) is not None:
            raise error

    def broken(self) -> PeerError:
        """Why an exchange was not whole."""
        return self._broken(None)

    def _broken(self, error: RuntimeError | None) -> PeerError:
        if self._watch is not None:
            self._watch.wait(self._watch.patience_s + REASON_S)
            if (found := self._watch.error()) is not None:
                return found
        why = first_line(error) if error else "it was not whole"
        return PeerError(f"rank {self.rank}: an exchange with the other ranks failed: {why}")

    def _abort(self) -> None:
        """End exchanges under way. On the watching thread."""
        self._alive.zero_()
        if self._nccl and self._group is not None:
            self._group.abort()

    def _wait(self, key: str) -> Any:
        """A value that another rank puts there; of a rank that lives."""
        assert self._watch is not None, "entered"
        while not self._store.check([key]):
            if self._watch.wait(POLL_S):
                self._check()
        return read(self._store, key)
