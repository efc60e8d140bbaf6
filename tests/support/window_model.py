"""A model of what surrounds a window: daemons, transfers and a training loop that know only its effects.

Each call of the window's is made with what it has to lead to in `owed`; `carry_out` checks that exactly that comes out.
Only submissions, and the room that is made for them, are the window's choice: those are judged by its rules.
"""

from __future__ import annotations

from collections import Counter, deque

from specd.client import effects
from specd.client.pending import State
from specd.transports.base import SlotRef
from windows import Effects, Item, Token, item, make, ready

LINKS = 3
FAILED = "it has failed"


class Life:
    """One session: what its daemon knows, by seq and by lease, and how many views of its slots there are."""

    def __init__(self, token: Token, link: int, credits: int, kind: str) -> None:
        self.token = token
        self.link = link
        self.credits = credits
        self.copies = kind == "copy"
        self.lends = kind == "borrow"
        self.announces = kind == "announce"
        self.up = True
        self.asked: dict[int, Work] = {}
        self.leases: dict[int, Work] = {}
        self.told: set[int] = set()
        self.views = 0


class Work:
    """One batch as the outside sees it. life: whose lease it has. place: where it is, or FAILED."""

    def __init__(self, pending: Item) -> None:
        self.pending = pending
        self.place: State | str = State.PENDING
        self.attempts = 0
        self.dropped = False
        self.life: Life | None = None
        self.lease = 0
        self.buffer: Token | None = None

    @property
    def ref(self) -> SlotRef:
        return SlotRef(self.lease, 1, self.pending.layout.nbytes)


class Model:
    """A window, and all that surrounds it."""

    def __init__(self, max_attempts: int) -> None:
        self.max_attempts = max_attempts
        self.window = make(LINKS, max_attempts)
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

    def up(self) -> list[Life]:
        return [life for life in self.links if life is not None]

    def asked(self) -> list[tuple[Life, Work]]:
        """Requests that daemons have not answered."""
        return [(life, work) for life in self.up() for work in life.asked.values()]

    def room(self, link: int) -> int:
        """A lost session's transfers take credits of the next one until they end."""
        late = sum(other.link == link and not other.up for _, other in self.transfers)
        life = self.links[link]
        return life.credits - len(life.asked) - len(life.leases) - late if life is not None else 0

    def waiting(self) -> list[Work]:
        return [work for work in self.order if work.place is State.PENDING]

    def borrowed(self) -> list[Work]:
        """Batches that are here by a lease, and were not looked at."""
        return [work for work in self.order if work.place is State.FETCHED and work.life is not None]

    # The window's effects

    def carry_out(self, todo: Effects) -> None:
        for effect in todo:
            match effect:
                case effects.SendSubmit(session, pending):
                    self._submit(self.lives[session], self.works[pending])
                    self.owed[effect] += 1
                case effects.SendRelease(session, lease):
                    self._released(self.lives[session], lease, effect)
                case effects.SendRecvReady(session, lease) | effects.SendBorrow(session, lease):
                    self.lives[session].told.add(lease)
                case effects.FetchSlot(session, pending):
                    life, work = self.lives[session], self.works[pending]
                    assert work.lease in life.told or not (life.lends or life.announces), "its daemon was not told"
                    self.queue.append((work, life))
                case effects.Unborrow(session):
                    self._unborrowed(self.lives[session], effect)
                case effects.Recycle(buffer):
                    assert buffer not in self.recycled, "a buffer is given back twice"
                    self.recycled.add(buffer)
                case effects.Missed(session, pending, reason):
                    assert reason in ("it failed", "its session was lost")
                case effects.Abandon() | effects.Return():
                    pass
            self.owed[effect] -= 1
        assert self._giving_up is None
        assert {effect: count for effect, count in self.owed.items() if count} == {}
        self.owed.clear()
        if waiting := self.waiting():
            assert max(self.room(link) for link in range(LINKS)) <= 0, "a batch is held back"
            if waiting[0] is self.order[0]:
                assert self.borrowed() == [], "the first waits for a credit that one behind it holds"

    def _submit(self, life: Life, work: Work) -> None:
        assert life.up, "a message in a session that is gone"
        assert work.place is State.PENDING, "it is there already, or over"
        assert not work.dropped, "what is dropped never comes back"
        assert self.waiting()[0] is work, "submitted out of order"
        rooms = [self.room(link) for link in range(LINKS)]
        assert rooms.index(max(rooms)) == life.link, "another daemon has more room"
        assert len(life.asked) + len(life.leases) < life.credits, "more than its credits"
        assert work.pending.seq not in life.asked
        work.attempts += 1
        work.place = State.SUBMITTED
        life.asked[work.pending.seq] = work

    def _released(self, life: Life, lease: int, effect: object) -> None:
        assert life.up, "a message in a session that is gone"
        work = life.leases.pop(lease)
        assert all(work is not moving for moving, _ in self.transfers), "its bytes are being sent"
        if self.owed[effect]:
            return
        assert self._giving_up is life, "a lease is released that is not over"
        assert self.order[0].place is State.PENDING, "room is made for another than the first"
        life.leases[lease] = work
        assert max(self.room(link) for link in range(LINKS)) <= 0, "there is room"
        assert self.borrowed()[-1] is work, "room is made by another than the last"
        del life.leases[lease]
        self._giving_up = None
        work.life, work.place, work.attempts = None, State.PENDING, work.attempts - 1
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
        if work.dropped:
            work.place = State.OVER
        elif work.attempts == self.max_attempts:
            work.place = FAILED
        else:
            work.place = State.PENDING
            self.resubmitted += 1

    def end(self, life: Life) -> None:
        """A session is over, and every promise of its daemon."""
        life.up = False
        self.links[life.link] = None
        for work in [*life.asked.values(), *life.leases.values()]:
            if work.place is State.FETCHED:
                self.release(work, State.PENDING)
            if work.place in (State.SUBMITTED, State.READY, State.PENDING):
                work.life = None
                self.retry(work)

    # What happens

    def add(self, count: int) -> None:
        fresh = [Work(item(len(self.works) + index)) for index in range(count)]
        self.works.update((work.pending, work) for work in fresh)
        self.order += fresh
        self.carry_out(self.window.add(work.pending for work in fresh))

    def announce(self, life: Life, work: Work) -> None:
        """A daemon has filled a slot."""
        del life.asked[work.pending.seq]
        self.num_leases += 1
        life.leases[self.num_leases] = work
        work.life, work.lease, work.place = life, self.num_leases, State.READY
        if work.dropped:
            self.release(work, State.OVER)
        else:
            self.owe(effects.FetchSlot(life.token, work.pending))
            if life.lends:
                self.owe(effects.SendBorrow(life.token, work.lease))
            elif life.announces:
                self.owe(effects.SendRecvReady(life.token, work.lease))
        self.carry_out(self.window.ready(life.token, ready(work.pending, work.lease)))

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
        if life.lends:
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
            elif work in self.borrowed() or (work.place is State.READY and work.life and not work.life.announces):
                self.release(work, State.OVER)
            elif work.place in (State.PENDING, FAILED):
                work.place = State.OVER
        self.order.clear()
        self.carry_out(self.window.drop())
