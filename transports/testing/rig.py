"""A host and the trainers attached to it: what the conformance suite drives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from specd.errors import TransportError
from specd.transports.base import Client, SlotRef, Transport
from specd.transports.checks import pattern
from specd.transports.testing.hosts import Host

if TYPE_CHECKING:
    import torch

GUARD = 64
"""Bytes behind the destination that must stay as they are."""


class Rig:
    """A host and the clients attached to it."""

    def __init__(self, transport: type[Transport], device: str, host: Host) -> None:
        self.transport = transport
        self.device = device
        self.host = host
        self.clients: list[Client] = []
        self._device_before: int | None = None

    def attach(self, session: bytes = b"one", deadline_s: float = 20.0) -> Client:
        if self.device != "cpu":  # as every thread of a subscriber does that touches a device
            import torch

            if self._device_before is None:
                self._device_before = torch.cuda.current_device()
            torch.cuda.set_device(self.device)
        client = self.transport.client(self.device)
        self.clients.append(client)
        client.attach(self.host.accept(session, client.hello()), deadline_s)
        return client

    def revive(self, client: Client, session: bytes = b"one") -> Client:
        """Attach anew after an error that was `lost`, as a subscriber does."""
        assert not self.transport.traits.abortable, "an abortable transport lost its client"
        client.close()
        self.clients.remove(client)
        self.host.drop(session)
        return self.attach(session)

    def publish(self, session: bytes, ref: SlotRef) -> None:
        """What the daemon does on RECV_READY, for the transports that need it."""
        if self.transport.traits.needs_recv_ready:
            self.host.publish(session, ref)

    def destination(self, nbytes: int) -> torch.Tensor:
        """Memory as a subscriber's, on pages of its own."""
        import torch

        from specd.memory.streams import allocate

        into = allocate(nbytes + GUARD, self.device)[: nbytes + GUARD].fill_(0xA5)
        if into.is_cuda:  # a transfer waits for no stream but its own
            torch.cuda.synchronize(into.device)
        return into

    def fetch(self, client: Client, ref: SlotRef, session: bytes = b"one", deadline_s: float = 20.0) -> torch.Tensor:
        """Announce and fetch; returns the bytes, and checks that nothing was written behind them."""
        into = self.destination(max(ref.nbytes, 0))
        self.publish(session, ref)
        client.fetch(ref, into, deadline_s)
        assert bool((into[ref.nbytes :] == 0xA5).all()), "wrote behind the destination"
        return into[: ref.nbytes]

    def fetch_after(
        self, client: Client, ref: SlotRef, session: bytes = b"one", deadline_s: float = 20.0
    ) -> torch.Tensor:
        """Fetch after a transfer that failed or was given up, which may have cost the client."""
        try:
            return self.fetch(client, ref, session, deadline_s)
        except TransportError as error:
            if not error.lost:
                raise
        return self.fetch(self.revive(client, session), ref, session, deadline_s)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.host.close()
        if self._device_before is not None:
            import torch

            torch.cuda.set_device(self._device_before)


def holds(found: torch.Tensor, nonce: bytes) -> bool:
    """Whether `found` is exactly the pattern of `nonce`."""
    import torch

    return torch.equal(found.cpu(), torch.from_numpy(pattern(nonce, found.numel())))
