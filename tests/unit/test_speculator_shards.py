"""Several draft sides: what one of them does not take costs the requests of the others nothing."""

from __future__ import annotations

import pytest

from tests.unit.speculator_bench import PROMPT, Bench, FakeChannel, admitted, outcomes, released
from vllm_saguaro.messages import Stamp, Step

HALF = 4
"""Slots of each of the two."""


class Halves(FakeChannel):
    """Two draft sides, of which each has a ring and a life of its own."""

    max_length = 1000

    def __init__(self) -> None:
        super().__init__(2 * HALF)
        self.shards = (range(HALF), range(HALF, 2 * HALF))
        self.lives = [1, 2]
        self.full: set[int] = set()
        """Those whose ring is full."""
        self.refused: list[Step] = []

    def epoch(self, slot: int) -> int:
        return self.lives[slot // HALF]

    def post(self, step: Step) -> bool:
        told = {one.stamp.slot // HALF for kind in (step.admits, step.outcomes, step.releases) for one in kind}
        if not told:
            return super().post(step)
        assert len(told) == 1, "a step for both cannot say who refused it"
        (shard,) = told
        if shard in self.full or not self.lives[shard]:
            self.refused.append(step)
            return False
        return super().post(step)


class TwoDrafts:
    """Requests a, b, c, d, of which a and c are with the first draft side, b and d with the second."""

    def __init__(self) -> None:
        self.channel = Halves()
        self.bench = Bench(channel=self.channel)
        for name in "abcd":
            self.bench.arrive(name)
        assert [self.shard(name) for name in "abcd"] == [0, 1, 0, 1]

    def stamp(self, name: str) -> Stamp:
        return self.bench.speculator._requests[name].stamp

    def shard(self, name: str) -> int | None:
        request = self.bench.speculator._requests.get(name)
        return None if request is None else request.stamp.slot // HALF

    def step(self, names: str = "abcd") -> str:
        """A step in which all have their tables; those that got drafts."""
        rows = []
        self.bench.speculator.begin_step([], [])
        for name in names:
            if self.shard(name) is not None:
                self.bench.table(self.stamp(name), (0, 31))
            rows.append(self.bench.row(name, 31))
        return "".join(name for name, found in zip(names, self.bench.propose(*rows), strict=True) if found)


@pytest.fixture
def two() -> TwoDrafts:
    return TwoDrafts()


def test_each_is_told_of_its_own_requests(two: TwoDrafts) -> None:
    assert two.step() == "abcd"
    assert [[o.stamp.slot // HALF for o in step.outcomes] for step in two.channel.steps[-2:]] == [[0, 0], [1, 1]]


def test_a_full_ring_costs_the_requests_of_the_other_nothing(two: TwoDrafts) -> None:
    two.channel.full = {0}
    assert two.step() == "abcd", "the drafts are valid whoever knows of them"
    for _ in range(100):
        assert {"b", "d"} <= set(two.step())
    assert len(admitted(two.bench)) == 6, "all that were told anew are those of the first"
    assert released(two.bench) == []
    assert sum(o.stamp.slot >= HALF for o in outcomes(two.bench)) >= 2 * 101


def test_its_requests_go_to_the_other_at_once(two: TwoDrafts) -> None:
    two.channel.full = {0}
    two.step()
    assert [two.shard(name) for name in "ac"] == [None, None]
    two.step()
    assert [two.shard(name) for name in "abcd"] == [1] * 4
    assert two.step() == "abcd"


def test_newcomers_go_to_the_other_at_once(two: TwoDrafts) -> None:
    two.channel.full = {0}
    two.step("ab")
    for name in "ef":
        two.bench.arrive(name)
    assert [two.shard(name) for name in "ef"] == [1, 1]
    assert not any(step.admits for step in two.channel.refused)


def test_while_the_other_has_no_room_the_full_one_is_asked_seldom(two: TwoDrafts) -> None:
    two.channel.full = {0}
    for name in "efgh":
        two.bench.arrive(name)
    two.step("abcdefgh")
    asked = len(two.bench.asked)
    for _ in range(200):
        assert len(two.step("abcdefgh")) == HALF
    assert len(two.bench.asked) - asked < 30, "texts are copied in vain"


def test_once_there_is_room_again_it_learns_its_share(two: TwoDrafts) -> None:
    two.channel.full = {0}
    for _ in range(10):
        two.step()
    two.channel.full = set()
    two.step()
    assert len(released(two.bench)) == 2, "it is told who has left"
    assert {stamp.slot // HALF for stamp in released(two.bench)} == {0}
    two.bench.arrive("e")
    assert two.shard("e") == 0
    two.bench.speculator.begin_step([], list("abcde"))
    assert sorted(two.bench.speculator._slots.free) == list(range(2 * HALF))


def test_one_that_refuses_a_text_and_has_nothing_else_to_hear_is_tried_again(two: TwoDrafts) -> None:
    two.bench.speculator.begin_step([], ["a", "c"])
    two.channel.full = {0}
    two.bench.arrive("e")
    assert two.shard("e") is None
    two.channel.full = set()
    two.step("bd")
    two.bench.arrive("f")
    assert two.shard("f") == 0


def test_one_that_ends_between_look_and_post_costs_the_requests_of_the_other_nothing(two: TwoDrafts) -> None:
    for name in "abcd":
        two.bench.table(two.stamp(name), (0, 31))
    rows = [two.bench.row(name, 31) for name in "abcd"]
    two.channel.on_read = lambda slot: two.channel.lives.__setitem__(0, 0)
    assert len(two.bench.propose(*rows)) == 4
    two.channel.on_read = lambda slot: None
    assert [two.shard(name) for name in "abcd"] == [None, 1, None, 1]
    assert two.step("bd") == "bd"
    assert len(admitted(two.bench)) == 4
    assert released(two.bench) == []


def test_what_one_has_not_heard_yet_is_no_matter_of_the_next_life_of_the_other(two: TwoDrafts) -> None:
    two.channel.full = {0}
    two.step()
    two.channel.lives[1] = 3
    two.step("bd")
    two.channel.full = set()
    two.step("bd")
    assert {stamp.slot // HALF for stamp in released(two.bench)} == {0, 1}
    two.channel.full = {0}
    two.bench.speculator.begin_step([], ["a", "c"])
    heard = len(released(two.bench))
    two.channel.lives[0], two.channel.full = 4, set()
    two.bench.speculator.begin_step([], [])
    assert len(released(two.bench)) == heard, "the next life holds nothing"


def test_a_text_that_the_second_refuses_is_no_matter_of_the_first(two: TwoDrafts) -> None:
    two.channel.full = {1}
    two.bench.arrive("e", PROMPT[:2])
    assert two.shard("e") == 0, "of equal ones the first"
    two.bench.arrive("f", PROMPT[:2])
    assert two.shard("f") is None
    assert [two.shard(name) for name in "abcd"] == [0, 1, 0, 1]
