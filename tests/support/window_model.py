"""A model of what surrounds a window: daemons, transfers and a training loop that know only its effects.

Each call of the window's is made with what it has to lead to in `owed`; `carry_out` checks that exactly that comes out.
Only submissions, copies, the room that is made for them, and cancelling are the window's choice: those are judged by
its rules. Which daemon gets a batch is not: that depends on their paces, and is tested by simulation.
"""

from __future__ import annotations

from collections import Counter, deque

from msgspec import structs

from specd.client import effects
from specd.client.peers import Keeping
from specd.client.pending import MOST_REST_S, REST_S, State
from specd.protocol.cut import cut
from specd.transports.base import SlotRef
from windows import MORE, SPEC, Clock, Effects, Item, Token, item, make, ready

LINKS = 3
FAILED = "it has failed"


class Life:
    """One session: what its daemon knows, by seq and by lease, and how many views of its slots there are.

    tiny: no batch fits its slots. keeps: it keeps states over epochs.
    """

    def __init__(
        self, token: Token, link: int, credits: int, kind: str, tiny: bool = False, keeps: bool = False
    ) -> None:
        self.token = token
        self.link = link
        self.credits = credits
        self.tiny, self.keeps = tiny, keeps
        self.copies = kind == "copy"
        self.lends = kind == "borrow"
        self.up = True
        self.asked: dict[int, Work] = {}
        self.leases: dict[int, Work] = {}
        self.told: set[int] = set()
        self.views = 0


class Work:
    """One batch as the outside sees it. life: whose lease it has, a slot of `held`. place: where it is, or FAILED."""

    def __init__(self, pending: Item) -> None:
        self.pending = pending
        self.place: State | str = State.PENDING
        self.submissions = self.misses = 0
        self.rests_until = 0.0
        self.dropped = False
        self.life: Life | None = None
        self.lease = 0
        self.held = SPEC
        self.buffer: Token | None = None

    @property
    def ref(self) -> SlotRef:
        layout = self.pending.layout
        tokens, _, hidden = layout.tensors[0].shape
        return SlotRef(self.lease, 1, layout.nbytes, cut(self.held, SPEC, hidden, tokens))

    @property
    def lent(self) -> bool:
        """Whether it is read in place: what lies in pieces is copied."""
        return self.life is not None and self.life.lends and self.held == SPEC

    @property
    def announced(self) -> bool:
        """Whether RECV_READY is sent for it."""
        return self.life is not None and not self.life.copies and not self.lent


class Model:
    """A window, and all that surrounds it."""

    def __init__(self, keeping: Keeping) -> None:
        self.clock, self.keeping = Clock(), keeping
        self.window = make(LINKS, self.clock, keeping)
        self.keepers: dict[int, bool] = {}  # whether each link, as last known, keeps what it can hold
        self.homes: dict[bytes, int] = {}
        self.links: list[Life | None] = [None] * LINKS
        self.lives: dict[Token, Life] = {}
        self.works: dict[Item, Work] = {}
        self.order: list[Work] = []  # what is still to be taken
        self.queue: deque[tuple[Work, Life]] = deque()  # transfers that were asked for
        self.transfers: list[tuple[Work, Life]] = []  # transfers that have begun
        self.using: list[Work] = []
        self.returning: list[Work] = []
        self.buffers: set[Token] = set()
        self.recycled: set[Token] = set()
        self.num_leases = self.resubmitted = 0
        self.owed: Counter[object] = Counter()
        self._giving_up: Life | None = None

    def open(self, life: Life) -> None:
        """A session begins."""
        self.links[life.link] = self.lives[life.token] = life
        keeps = life.keeps and not life.tiny
        if keeps != self.keepers.get(life.link, False):
            self.homes.clear()
        self.keepers[life.link] = keeps

    def up(self) -> list[Life]:
        return [life for life in self.links if life is not None]

    def asked(self) -> list[tuple[Life, Work]]:
        """Requests that daemons have not answered."""
        return [(life, work) for life in self.up() for work in life.asked.values()]

    def is_asked(self, work: Work) -> bool:
        """Whether any daemon owes an answer about a batch."""
        return any(other is work for _, other in self.asked())

    def room(self, link: int) -> int:
        """A lost session's transfers take credits of the next one until they end."""
        late = sum(other.link == link and not other.up for _, other in self.transfers)
        life = self.links[link]
        return life.credits - len(life.asked) - len(life.leases) - late if life is not None else 0

    def most_room(self) -> int:
        """The room of the daemon with most, of those that any batch fits."""
        return max((self.room(life.link) for life in self.up() if not life.tiny), default=0)

    def first_waits(self) -> bool:
        """Whether the first batch is still to be submitted."""
        first = self.order[0] if self.order else None
        return first is not None and first.place is State.PENDING and first.rests_until <= self.clock.now

    def borrowed(self) -> list[Work]:
        """Batches that are here by a lease, and were not looked at."""
        return [work for work in self.order if work.place is State.FETCHED and work.life is not None]

    # The window's effects

    def carry_out(self, todo: Effects) -> None:
        for effect in todo:
            match effect:
                case effects.SendSubmit(session, pending, late, keep):
                    self._submit(self.lives[session], self.works[pending], late)
                    self._kept(self.lives[session], self.works[pending], keep)
                    self.owed[effect] += 1
                case effects.SendRelease(session, lease):
                    self._released(self.lives[session], lease, effect)
                case effects.SendRecvReady(session, lease) | effects.SendBorrow(session, lease):
                    self.lives[session].told.add(lease)
                case effects.FetchSlot(session, pending):
                    life, work = self.lives[session], self.works[pending]
                    assert work.lease in life.told or life.copies, "its daemon was not told"
                    self.queue.append((work, life))
                case effects.Unborrow(session):
                    self._unborrowed(self.lives[session], effect)
                case effects.Recycle(buffer):
                    assert buffer not in self.recycled, "a buffer is given back twice"
                    self.recycled.add(buffer)
                case effects.Missed(session, pending, reason):
                    assert reason in ("it failed", "its session was lost")
                case effects.Cancel(session):
                    assert self.lives[session] in [life for _, life in self.transfers], "nothing moves"
                    self.owed[effect] += 1
                case effects.Abandon() | effects.Return():
                    pass
            self.owed[effect] -= 1
        assert self._giving_up is None
        assert {effect: count for effect, count in self.owed.items() if count} == {}
        self.owed.clear()
        if self.first_waits():
            assert self.most_room() <= 0, "the first batch is held back"
            assert self.borrowed() == [], "the first waits for a credit that one behind it holds"

    def _submit(self, life: Life, work: Work, late: float) -> None:
        assert life.up, "a message in a session that is gone"
        assert not life.tiny, "it fits no slot"
        assert not work.dropped, "what is dropped never comes back"
        assert work.rests_until <= self.clock.now, "it rests"
        assert len(life.asked) + len(life.leases) < life.credits, "more than its credits"
        assert work.pending.seq not in life.asked, "it is asked for already"
        assert (work.place is State.SUBMITTED) == self.is_asked(work)
        if late:
            assert work is self.order[0], "only the first is waited for"
        assert work.place is (State.SUBMITTED if late else work.place)
        assert work.place in (State.PENDING, State.SUBMITTED), "it is there already, or over"
        work.submissions += 1
        work.place = State.SUBMITTED
        life.asked[work.pending.seq] = work

    def _kept(self, life: Life, work: Work, keep: bool) -> None:
        """Whether a daemon may keep a batch."""
        if self.keeping != "home" or not any(self.keepers.values()):
            assert keep == (self.keeping != "nowhere")
        elif keep:
            assert life.keeps, "it has no home there"
            assert self.homes.setdefault(work.pending.identity, life.link) == life.link, "it has two homes"

    def _released(self, life: Life, lease: int, effect: object) -> None:
        assert life.up, "a message in a session that is gone"
        work = life.leases.pop(lease)
        assert (work, life) not in self.transfers, "its bytes are being sent"
        if self.owed[effect]:
            return
        assert self._giving_up is life, "a lease is released that is not over"
        first = self.order[0]
        assert first.place in (State.PENDING, State.SUBMITTED), "room is made for another than the first"
        life.leases[lease] = work
        if first.place is State.PENDING:
            assert self.most_room() <= 0, "there is room"
            assert self.borrowed()[-1] is work, "room is made by another than the last"
        del life.leases[lease]
        self._giving_up = None
        work.life, work.place = None, State.SUBMITTED if self.is_asked(work) else State.PENDING
        self.owed[effect] += 1

    def _unborrowed(self, life: Life, effect: object) -> None:
        life.views -= 1
        assert life.views >= 0, "a view is dropped twice"
        if not self.owed[effect]:
            assert self._giving_up is None
            self._giving_up = life
            self.owed[effect] += 1

    # What has to come of something

    def owe(self, effect: object) -> None:
        self.owed[effect] += 1

    def release(self, work: Work, place: State | str) -> None:
        """A batch's lease ends, and with it the view that nobody has looked at."""
        life = work.life
        assert life is not None
        if work.place is State.FETCHED:
            self.owe(effects.Unborrow(life.token))
        if life.up:
            self.owe(effects.SendRelease(life.token, work.lease))
        work.life, work.place = None, place

    def recycle(self, work: Work) -> None:
        """A batch that has no lease is over."""
        assert work.buffer is not None
        work.place = State.OVER
        self.owe(effects.Recycle(work.buffer))

    def retry(self, work: Work) -> None:
        """A batch that nobody brings is brought by who was asked for a copy, or pending."""
        if work.dropped:
            work.place = State.OVER
        elif self.is_asked(work):
            work.place = State.SUBMITTED
        else:
            work.place = State.PENDING
            self.resubmitted += 1

    def end(self, life: Life) -> None:
        """A session is over, and every promise of its daemon."""
        life.up = False
        self.links[life.link] = None
        for work in life.asked.values():
            if work.place is State.SUBMITTED and not self.is_asked(work):
                self.retry(work)
        for work in life.leases.values():
            if work.place is State.FETCHED:
                self.release(work, State.READY)
            if work.place is State.READY:
                work.life = None
                self.retry(work)

    # What happens

    def add(self, count: int) -> None:
        fresh = [Work(item(len(self.works) + index)) for index in range(count)]
        self.works.update((work.pending, work) for work in fresh)
        self.order += fresh
        self.carry_out(self.window.add(work.pending for work in fresh))

    def announce(self, life: Life, work: Work) -> None:
        """A daemon has filled a slot, every third one for others of a share too."""
        del life.asked[work.pending.seq]
        self.num_leases += 1
        lease, held = self.num_leases, SPEC if self.num_leases % 3 else MORE
        life.leases[lease] = work
        if work.dropped or work.place is not State.SUBMITTED:  # unwanted, or another was first
            self.owe(effects.SendRelease(life.token, lease))
            if work.dropped and work.place is State.SUBMITTED and not self.is_asked(work):
                work.place = State.OVER
        else:
            work.life, work.lease, work.place, work.held = life, lease, State.READY, held
            self.owe(effects.FetchSlot(life.token, work.pending))
            if work.lent:
                self.owe(effects.SendBorrow(life.token, lease))
            elif work.announced:
                self.owe(effects.SendRecvReady(life.token, lease))
        message = ready(work.pending, lease, held=held)
        source = "forward" if lease % 3 else "replay"
        self.carry_out(self.window.ready(life.token, structs.replace(message, source=source)))

    def refuse(self, life: Life, work: Work) -> None:
        """A daemon cannot capture a batch."""
        del life.asked[work.pending.seq]
        if work.place is State.SUBMITTED and not self.is_asked(work):
            work.place = State.OVER if work.dropped else FAILED
        self.carry_out(self.window.failed(life.token, work.pending.seq, "it does not fit"))

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.carry_out(self.window.tick())

    def begin(self) -> None:
        work, life = self.queue.popleft()
        wanted = work.place is State.READY and work.life is life
        assert self.window.begin(work.pending, life.token) == (work.ref if wanted else None)
        if wanted:
            work.place = State.FETCHING
            self.transfers.append((work, life))

    def brought(self, work: Work, life: Life) -> None:
        self.transfers.remove((work, life))
        buffer = work.buffer = Token(f"buffer of {work.pending}")
        if work.lent:
            life.views += 1
            work.place = State.FETCHED
            if work.dropped:
                self.release(work, State.OVER)
            elif not life.up:
                self.owe(effects.Missed(life.token, work.pending, "its session was lost"))
                self.release(work, State.PENDING)
                self.retry(work)
        else:
            self.buffers.add(buffer)
            self.release(work, State.FETCHED)
            if work.dropped:
                self.recycle(work)
        self.carry_out(self.window.fetched(work.pending, buffer, 1.0))

    def missed(self, work: Work, life: Life, lost: bool) -> None:
        self.transfers.remove((work, life))
        self.owe(effects.Missed(life.token, work.pending, "it failed"))
        work.misses += 1
        if work.misses > 1:
            work.rests_until = self.clock.now + min(REST_S * 2 ** (work.misses - 2), MOST_REST_S)
        if lost and life.up:
            self.owe(effects.Abandon(life.token, "it failed"))
            self.end(life)
        self.release(work, State.PENDING)
        self.retry(work)
        self.carry_out(self.window.missed(work.pending, "it failed", 1.0, lost=lost))

    def take(self) -> None:
        """The first batch is trained, which is here."""
        first = self.order.pop(0)
        assert self.window.first is first.pending
        assert first.pending.buffer is first.buffer
        first.place = State.USED
        self.using.append(first)
        self.carry_out(self.window.take())

    def give_back(self, work: Work) -> None:
        self.using.remove(work)
        if work.life is None:
            self.recycle(work)
        else:
            self.returning.append(work)
            self.owe(effects.Return(work.life.token, work.ref, work.pending))
        self.carry_out(self.window.give_back(work.pending))
        assert self.window.give_back(work.pending) == [], "a batch is given back twice"

    def read(self, work: Work) -> None:
        """The training stream has read a borrowed batch."""
        self.returning.remove(work)
        assert work.life is not None
        work.life.views -= 1
        self.release(work, State.OVER)
        self.carry_out(self.window.returned(work.pending))

    def drop(self) -> None:
        for work in self.order:
            work.dropped = True
            if work.place is State.FETCHED and work.life is None:
                self.recycle(work)
            elif work in self.borrowed() or (work.place is State.READY and not work.announced):
                self.release(work, State.OVER)
            elif work.place in (State.PENDING, FAILED):
                work.place = State.OVER
        self.order.clear()
        self.carry_out(self.window.drop())
