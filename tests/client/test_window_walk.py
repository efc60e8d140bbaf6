"""A random walk of the window beside a model of daemons, transfers and a training loop that know only its effects."""

from __future__ import annotations

from typing import TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specd.client.pending import State
from specd.errors import BatchError, ProtocolError
from specd.protocol.batch import Layout
from window_model import FAILED, LINKS, Life, Model, Work
from windows import SLOT, Token, ready

T = TypeVar("T")
KINDS = st.sampled_from(["copy", "announce", "borrow", "borrow"])
CREDITS = st.integers(1, 3)
STEPS = {
    "train": 7, "stop": 1, "serve": 3, "starve": 3, "fill": 3, "transfer": 5, "answer": 3, "lose": 2, "reopen": 3,
    "wait": 4,
}  # fmt: skip
OUTCOMES = st.sampled_from(["brought"] * 9 + ["missed", "lost"])
PAUSES = st.sampled_from([0.01, 0.01, 0.1, 1.5, 4.0, 100.0])
WRONG = ({"seq": 1 << 40}, {"batch_id": b"x" * 16}, {"layout": Layout(tensors=(), nbytes=4)})


class Walk:
    """Random steps of all that surrounds a window; whatever it answers has to fit the model."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data
        self.model = Model(self.draw(st.sampled_from(["anywhere", "home", "home", "nowhere"]), "keeping"))
        for link in range(LINKS):
            self.open(link)

    def draw(self, strategy: st.SearchStrategy[T], label: str) -> T:
        return self._data.draw(strategy, label=label)

    def step(self) -> None:
        name = self.draw(st.sampled_from([name for name, weight in STEPS.items() for _ in range(weight)]), "step")
        getattr(self, name)()

    # The training loop

    def train(self) -> None:
        """Draw batches, take all that are here, give back all but a few."""
        model, keep = self.model, self.draw(st.integers(0, 2), "keep")
        if len(model.order) < 8:
            model.add(self.draw(st.integers(1, 4), "count"))
        while model.order and model.order[0].place is State.FETCHED:
            assert model.window.here()
            model.take()
        while len(model.using) > keep:
            model.give_back(model.using[-1])
        while len(model.returning) > keep:
            model.read(model.returning[-1])
        if model.order and model.order[0].place == FAILED:
            with pytest.raises(BatchError, match=model.order[0].pending.identity.hex()):
                model.window.here()
            model.drop()
        assert not model.order or not model.window.here()

    def stop(self) -> None:
        """The training loop gives up what is in flight, and perhaps what it has."""
        self.model.drop()
        keep = self.draw(st.integers(0, 2), "keep")
        while len(self.model.using) > keep:
            self.model.give_back(self.model.using[0])

    # Daemons

    def open(self, link: int) -> None:
        model, token = self.model, Token(f"session-{len(self.model.lives)}")
        tiny = link > 0 and self.draw(st.integers(0, 5), "seldom tiny") == 5
        keeps = self.draw(st.booleans(), "keeps")
        life = Life(token, link, self.draw(CREDITS, "credits"), self.draw(KINDS, "kind"), tiny, keeps)
        model.open(life)
        slot_bytes = 0 if tiny else SLOT
        opened = model.window.opened(
            link, token, life.credits, slot_bytes, borrow=life.lends, announce=not life.copies, keeps=keeps
        )
        model.carry_out(opened)

    def requests(self) -> list[tuple[Life, Work]]:
        """What daemons are to capture, oldest first."""
        return sorted(self.model.asked(), key=lambda request: request[1].pending.seq)

    def lose(self) -> None:
        if self.model.up():
            self.end_session(self.draw(st.sampled_from(self.model.up()), "session"))

    def starve(self) -> None:
        """All but the oldest request is served, whose session then ends."""
        self.serve(but=1)
        if self.model.asked():
            self.end_session(self.requests()[0][0])

    def end_session(self, life: Life) -> None:
        model = self.model
        model.end(life)
        model.carry_out(model.window.lost(life.token, "it died"))
        assert model.window.lost(life.token, "it died") == []
        for work in life.asked.values():  # what it says late is of no account
            assert model.window.ready(life.token, ready(work.pending, 1)) == []
            assert model.window.failed(life.token, work.pending.seq, "late") == []

    def reopen(self) -> None:
        """Most sessions that were lost are opened anew."""
        for link, life in enumerate(self.model.links):
            if life is None and self.draw(st.integers(0, 3), "seldom not"):
                self.open(link)

    def answer(self) -> None:
        """A daemon announces a batch, says that it cannot be captured, or says something wrong."""
        if not self.model.asked():
            return
        life, work = self.draw(st.sampled_from(self.model.asked()), "request")
        what = self.draw(st.sampled_from(["ready"] * 6 + ["failed"] * 2 + [*WRONG]), "answer")
        if what == "failed":
            self.model.refuse(life, work)
        elif what == "ready":
            self.model.announce(life, work)
        wrong = what if isinstance(what, dict) else {}
        with pytest.raises(ProtocolError):  # it is not what was asked for, or no longer
            self.model.window.ready(life.token, msgspec.structs.replace(ready(work.pending, 1), **wrong))

    def wait(self) -> None:
        """Time passes while the training loop waits."""
        self.model.wait(self.draw(PAUSES, "seconds"))

    def fill(self, but: int = 0) -> None:
        """All but a few of the oldest requests are captured."""
        for request in self.requests()[but:]:
            if request in self.model.asked():
                self.model.announce(*request)

    # Transfers

    def transfer(self) -> None:
        """Some transfers begin, and one ends, not always the first."""
        for _ in range(min(self.draw(st.integers(0, 3), "count"), len(self.model.queue))):
            self.model.begin()
        if self.model.transfers:
            self.end(*self.draw(st.sampled_from(self.model.transfers), "transfer"))

    def serve(self, but: int = 0) -> None:
        """Daemons fill all slots but a few of the oldest requests', and what is filled is transferred."""
        self.fill(but)
        while self.model.queue:
            self.model.begin()
        for transfer in list(self.model.transfers):
            self.end(*transfer)

    def end(self, work: Work, life: Life) -> None:
        outcome = self.draw(OUTCOMES, "outcome")
        if outcome == "brought":
            self.model.brought(work, life)
        else:
            self.model.missed(work, life, lost=outcome == "lost")

    # What holds at all times

    def check(self) -> None:
        model, window = self.model, self.model.window
        assert len(window) == len(model.order)
        assert set(window.in_use) == {work.pending for work in model.using}
        assert window.resubmitted == model.resubmitted
        for work in model.works.values():
            failed = work.place == FAILED
            if work.dropped and model.is_asked(work):  # whose answer is the last makes no difference
                assert work.pending.state in (State.SUBMITTED, State.OVER, work.place)
            else:
                assert work.pending.state is (State.OVER if failed else work.place)
            assert work.pending.submissions == work.submissions
            assert (work.pending.error is not None) == failed or work.dropped
        for life in model.up():
            assert len(life.asked) + len(life.leases) <= life.credits, "more than its credits"

    def finish(self) -> None:
        """Whatever happened, all leases, views, buffers and credits are given back in the end."""
        model = self.model
        model.drop()
        while model.queue:
            model.begin()
        while model.transfers:
            model.brought(*model.transfers[0])
        while model.using:
            model.give_back(model.using[0])
        while model.returning:
            model.read(model.returning[0])
        for request in model.asked():
            model.announce(*request)
        for life in model.lives.values():
            assert life.views == 0, "a view is never given back"
            assert not life.up or (not life.leases and model.room(life.link) == life.credits)
        assert model.recycled == model.buffers
        assert {work.place for work in model.works.values()} <= {State.OVER, FAILED}


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_random_walk_agrees_with_the_model(data: st.DataObject) -> None:
    walk = Walk(data)
    for _ in range(data.draw(st.sampled_from([10, 60, 60, 60]), label="steps")):
        walk.step()
        walk.check()
    walk.finish()
