"""Windows without threads, for tests: sessions and buffers that are mere tokens, and what daemons say of batches."""

from __future__ import annotations

from functools import cache

from samples import batch
from specd.client.effects import Effect
from specd.client.peers import Keeping, Peers
from specd.client.pending import Pending, State
from specd.client.window import Window
from specd.protocol.batch import Batch, Layout, batch_id, slot_layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.messages import Ready
from specd.transports.base import SlotRef

SPEC = CaptureSpec(taps=(1,), dtype="float32")
MORE = CaptureSpec(taps=(1, 2), dtype="float32")
"""Of a slot of a share: what is wanted lies in pieces there."""
SLOT = 1 << 20
"""The size of a slot that any batch of the tests fits."""


class Token:
    """A session or a buffer: nothing but its identity. name: for whoever reads a failure."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


Item = Pending[Token, Token]
BUFFER = Token("buffer")
Effects = list[Effect[Token, Token]]


def make(num_daemons: int = 1, clock: Clock | None = None, keeping: Keeping = "anywhere") -> Window[Token, Token]:
    return Window(Peers([f"daemon-{place}" for place in range(num_daemons)], (), keeping), clock or Clock())


def show_pace(window: Window[Token, Token], clock: Clock, place: int, seconds: float) -> None:
    """Let a daemon show that a batch takes it so long."""
    pace = window._peers[place].pace
    for _ in range(2):
        pace.ask(0, item(0).tokens, clock.now)
        clock.now += seconds
        pace.answer(0, 0.0, clock.now)
        pace.forget(0, clock.now)


@cache
def content(index: int) -> tuple[Batch, bytes, Layout]:
    made = batch(index)
    return made, batch_id("", made.tokens, made.lengths), slot_layout(SPEC, 4, made.num_tokens)


def item(index: int) -> Item:
    """A batch that no window knows yet."""
    return Pending(*content(index), SPEC)


def ready(pending: Item, lease: int, target_us: int = 0, held: CaptureSpec = SPEC) -> Ready:
    """What a daemon announces for a batch that it has been asked for: under a lease of its slot's number."""
    return Ready(
        epoch=b"e" * 16, seq=pending.seq, batch_id=pending.identity, lease=lease, slot=lease, generation=1,
        layout=pending.layout, busy_slots=1, target_us=target_us, held=held,
    )  # fmt: skip


def added(window: Window[Token, Token], count: int) -> list[Item]:
    """Batches that were submitted, as far as there is room."""
    batches = [item(index) for index in range(count)]
    window.add(batches)
    return batches


def fetched(window: Window[Token, Token], pending: Item, lease: int, buffer: Token = BUFFER) -> None:
    """A batch that was submitted is captured and transferred."""
    assert pending.daemon is not None
    session = window._peers[pending.daemon].session
    assert session is not None
    window.ready(session, ready(pending, lease))
    assert window.begin(pending, session) == SlotRef(lease, 1, pending.layout.nbytes)
    window.fetched(pending, buffer, 0.5)
    assert pending.state is State.FETCHED
