"""One NIXL agent on the UCX engine: memory it may touch, one peer, and READs with a deadline.

Facts about NIXL 1.5 that this module relies on:

- Metadata of a peer is NIXL's own tag-length-value text, read in C++. No pickle takes part as long as
  `deserialize_descs` is never called; but the parser is not hardened, and UCX registers memory for writing too. Who has
  the metadata can read and write the ring: it goes only to trainers that control let in.
- Releasing a transfer in flight does not stop it: its bytes may still land. Nothing can land any more once
  the agent is destroyed, its queue pairs and registrations with it. So a READ that is given up costs the agent.
- An agent is used by one thread at a time; its callers see to that.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import logging.config
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar

import msgspec

from specd.errors import TransportError, missing_extra
from specd.memory import cuda

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

log = logging.getLogger(__name__)

ENGINE: Final = "UCX"
OPTIONS: Final = "POSIX_ERROR_HANDLING=y,SYSV_ERROR_HANDLING=y,TLS=^tcp,KEEPALIVE_INTERVAL=inf"
"""Options of the engine, without the prefix UCX_; one that is set in the environment wins.

The first two keep lanes through shared memory in a mode that notices the peer's death. Without tcp no listener is
opened on any interface; a peer that needs it is served better by the bytes transport. Keep-alives crash UCX 1.23
(`ucp_ep_do_uct_ep_am_keepalive`) when a peer ended while it was connecting; deadlines and leases do their job.
"""
PAUSE_S: Final = (20e-6, 1e-3)
"""Shortest and longest back-off between two polls of a transfer: NIXL has nothing to wait on."""
_importing: Final = threading.Lock()


class Region(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A stretch of one process's memory. device: the ordinal there for VRAM, 0 for DRAM."""

    memory: Literal["DRAM", "VRAM"]
    address: int
    nbytes: int
    device: int = 0

    def part(self, offset: int, nbytes: int) -> Region:
        """`nbytes` from `offset` on."""
        assert 0 <= offset <= offset + nbytes <= self.nbytes
        return Region(memory=self.memory, address=self.address + offset, nbytes=nbytes, device=self.device)

    def overlaps(self, other: Region) -> bool:
        """Whether the two share a byte."""
        if (self.memory, self.device) != (other.memory, other.device):
            return False
        return self.address < other.address + other.nbytes and other.address < self.address + self.nbytes

    def covers(self, other: Region) -> bool:
        """Whether `other` lies inside."""
        return (
            (self.memory, self.device) == (other.memory, other.device)
            and self.address <= other.address
            and other.address + other.nbytes <= self.address + self.nbytes
        )


class NixlAgent:
    """An agent with the UCX engine and nothing registered.

    device: the one whose memory will be registered, beside the host's. Raises TransportError when NIXL is not
    installed, or its engine does not start here.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._stream: Any = None
        if device != "cpu":
            import torch

            cuda.ordinal(device)
            stream: Any = torch.cuda.Stream  # untyped
            self._stream = stream(device)
        nixl = _nixl(device)
        # Unique over all lives of all processes: a peer knows an agent by its name alone.
        self.name = f"specd-{secrets.token_hex(16)}"
        self._peer = ""
        self._nixl: Any = None
        problem = ""
        with self.current():
            try:
                # NIXL's progress thread would keep a core busy, and slows READs down.
                self._nixl = nixl.nixl_agent(self.name, nixl.nixl_agent_config(enable_prog_thread=False, backends=[]))
                self._nixl.create_backend(ENGINE, {"engine_config": OPTIONS})
            except Exception as error:  # noqa: BLE001  # NIXL's errors have no base of their own
                problem = _text(error)
        if problem:
            self.close()
            raise TransportError(f"nixl: its {ENGINE} engine does not start here: {problem}")

    @property
    def closed(self) -> bool:
        """Whether it was closed, or lost with a READ that failed."""
        return self._nixl is None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the device's context current on this thread: UCX takes the one it finds. Wrap all other calls in it."""
        if self._stream is None:
            yield
            return
        import torch

        with torch.cuda.device(self._device):
            self._stream.query()  # selecting a device alone does not, where it is selected already
            yield

    def register(self, region: Region) -> Any:
        """Let the engine read and write a region, until the handle returned goes to `deregister`."""
        entry = (region.address, region.nbytes, region.device, "")
        return self._ask(
            f"register {region.nbytes} bytes of {region.memory}",
            lambda nixl: nixl.register_memory([entry], region.memory, [ENGINE]),
        )

    def deregister(self, handle: Any) -> None:
        """Undo `register`, before the memory goes."""
        self._ask("deregister memory", lambda nixl: nixl.deregister_memory(handle, [ENGINE]))

    def metadata(self) -> bytes:
        """What a peer's `connect` takes: how to reach this agent, and the keys of all it has registered by now."""
        return bytes(self._ask("describe itself", lambda nixl: nixl.get_agent_metadata()))

    def connect(self, name: str, metadata: bytes) -> None:
        """Have the agent called `name` as the peer, instead of any before."""
        self.disconnect()
        found = self._ask("load the peer's metadata", lambda nixl: nixl.add_remote_agent(metadata))
        self._peer = found.decode(errors="replace") if isinstance(found, bytes) else str(found)
        if self._peer != name:
            self.disconnect()
            raise TransportError(f"nixl: the peer's metadata is of agent {found!r}, expected {name!r}")

    def disconnect(self) -> None:
        """Have no peer."""
        peer, self._peer = self._peer, ""
        if peer:
            self._ask("forget the peer", lambda nixl: nixl.remove_remote_agent(peer))

    def progress(self) -> None:
        """Answer peers that connect; their READs need nothing of this side."""
        self._ask("make progress", lambda nixl: nixl.get_new_notifs([ENGINE]))

    def read(self, into: Region, source: Region, deadline: float, stop: threading.Event) -> None:
        """Copy the peer's `source` to `into`, of equal size and registered here; on return the bytes are there.

        deadline: on the monotonic clock; `stop` ends the wait as well. Raises TransportError; if it says `lost`, the
        agent is closed, with every transfer in flight.
        """
        if time.monotonic() >= deadline:
            raise TransportError("nixl: no time is left to start a transfer")
        if problem := self._transfer(into, source, deadline, stop):
            self.close()
            raise TransportError(f"nixl: reading {source.nbytes} bytes {problem}", lost=True)

    def _transfer(self, into: Region, source: Region, deadline: float, stop: threading.Event) -> str:
        """READ; returns what went wrong. It raises nothing, because a traceback would keep the engine alive."""
        nixl, handle, state, begin = self._nixl, None, "", time.monotonic()
        if nixl is None:
            return "failed: the agent is closed"
        try:
            local, remote = (
                nixl.get_xfer_descs([(part.address, part.nbytes, part.device)], part.memory) for part in (into, source)
            )
            handle = nixl.initialize_xfer("READ", local, remote, self._peer, backends=[ENGINE])
            state = nixl.transfer(handle)
            while state == "PROC":
                if (now := time.monotonic()) >= deadline:
                    return f"did not end within {now - begin:.3g} s"
                if stop.wait(min(max((now - begin) / 8, PAUSE_S[0]), PAUSE_S[1])):
                    return "was given up: this side is being closed"
                state = nixl.check_xfer_state(handle)
        except Exception as error:  # noqa: BLE001  # NIXL's errors have no base of their own
            return f"failed: {_text(error)}"
        finally:
            if handle is not None:
                with contextlib.suppress(Exception):
                    handle.release()
        return "" if state == "DONE" else f"ended in state {state}"

    def close(self) -> None:
        """Destroy the engine; nothing is read or written through it any more when this returns. Idempotent."""
        nixl, self._nixl = self._nixl, None
        if nixl is None:
            return
        # Of the binding and not of its wrapper, which any traceback may hold.
        engine = weakref.ref(nixl.agent)
        with self.current():
            nixl.agent = None
            if engine() is not None:
                gc.collect()
            if engine() is not None:
                log.error("the nixl agent %s is still in use somewhere and cannot be destroyed", self.name)
            if self._stream is not None:
                import torch

                # Copies that the engine queued on streams of its own outlive it.
                torch.cuda.synchronize(self._device)

    def _ask(self, what: str, call: Callable[[Any], T]) -> T:
        """Call NIXL; its error as a TransportError without its traceback, which would keep the engine alive."""
        if self._nixl is None:
            raise TransportError(f"nixl cannot {what}: the agent is closed", lost=True)
        try:
            return call(self._nixl)
        except Exception as error:  # noqa: BLE001  # NIXL's errors have no base of their own
            problem = _text(error)
        raise TransportError(f"nixl cannot {what}: {problem}")

    def __repr__(self) -> str:
        return f"NixlAgent({self.name}, {'closed' if self.closed else self._peer or 'no peer'})"


class _Known(NamedTuple):
    """What is registered: `region`, of `tensor`, in `storage`. handle: for `deregister`."""

    tensor: weakref.ref[torch.Tensor]
    storage: torch.UntypedStorage
    region: Region
    handle: Any


class Destinations:
    """The tensors that READs go to, each registered at its first use and until it is gone.

    The memory of one that is gone stays until it is deregistered, which the next READ does: a driver would still take
    whatever comes to lie there, of this agent or another one, for what was registered.
    """

    def __init__(self, agent: NixlAgent) -> None:
        self._agent = agent
        self._known: list[_Known] = []

    def region(self, into: torch.Tensor) -> Region:
        """Where a contiguous uint8 vector lies, registered. Raises TransportError when that is refused."""
        wanted = Region(
            memory="VRAM" if into.is_cuda else "DRAM",
            address=into.data_ptr(),
            nbytes=into.numel(),
            device=into.get_device() if into.is_cuda else 0,
        )
        covered = False
        for known in list(self._known):
            if known.tensor() is None or (known.region.overlaps(wanted) and not known.region.covers(wanted)):
                self._agent.deregister(known.handle)
                self._known = [one for one in self._known if one is not known]  # to compare is to compare tensors
            else:
                covered = covered or known.region.covers(wanted)
        if not covered:
            handle = self._agent.register(wanted)
            self._known.append(_Known(weakref.ref(into), into.untyped_storage(), wanted, handle))
        return wanted

    def forget(self) -> None:
        """Let go of all memory: the agent is closed."""
        self._known.clear()

    def __len__(self) -> int:
        return len(self._known)


def _nixl(device: str) -> Any:
    """NIXL's Python package, of the CUDA that torch has if a device is to be served."""
    names = ["nixl_cu13", "nixl_cu12"]
    if device != "cpu":
        import torch

        if str(torch.version.cuda).startswith("12."):
            names.reverse()
    with _importing, _quiet():
        for name in names:
            try:
                return importlib.import_module(name)
            except ImportError as error:
                if error.name != name:
                    raise TransportError(f"nixl: {name} is installed and cannot be imported: {error}") from None
    wanted = names[0]
    raise TransportError(str(missing_extra(wanted.replace("_", "-"), wanted.replace("nixl_cu", "nixl-cuda"))))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep `import nixl_cu13` (its module logging.py, 1.5.1) from configuring this process's logging.

    It would close the handlers that exist, print to standard output, and switch `logging.raiseExceptions` off.
    """
    configure, raising = logging.config.dictConfig, logging.raiseExceptions
    logging.config.dictConfig = lambda config: None
    try:
        yield
    finally:
        logging.config.dictConfig, logging.raiseExceptions = configure, raising


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
