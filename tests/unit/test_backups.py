"""What a row gets whose outcome nobody predicted: n-gram guesses, drafts just in time, or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.unit.speculator_bench import PROMPT, Bench, K, admitted, arrived, outcomes, wants
from vllm_saguaro import counters
from vllm_saguaro.messages import Outcome, Stamp, Table, Want
from vllm_saguaro.policy import Policy, Source


class Patient(Policy):
    """Waits so many seconds for just-in-time drafts: long enough, or not at all; and for the rest of a late branch."""

    def __init__(self, backup: str, seconds: float = 10.0, more: int = 0) -> None:
        super().__init__(K, backup, adaptive=False)
        self.seconds, self.more = seconds, more
        self.waited: list[int] = []
        self.late: list[tuple[int, float]] = []

    def patience(self, depth: int) -> float:
        return self.seconds

    def more_depths(self, have: int, most: int, late: int) -> int:
        return min(self.more, most - have)

    def observe_jit(self, depth: int, seconds: float) -> None:
        assert seconds >= 0
        self.waited.append(depth)

    def observe_late(self, asked: int, gained: float, seconds: float) -> None:
        assert seconds >= 0
        self.late.append((asked, gained))


def serving(bench: Bench, depth: int = K, version: int = 99) -> None:
    """The draft side answers each want with a table of the outcome alone, its drafts 70, 71, .."""

    def answer(asked: Sequence[Want]) -> None:
        for want in asked:
            rows = [[70 + d] for d in range(min(depth, want.depth))]
            bench.channel.tables[want.stamp.slot] = Table(
                want.stamp, [want.accepted], [want.bonus], rows, version=version
            )

    bench.channel.on_wants = answer


def missed(policy: Policy, **texts: Sequence[int]) -> tuple[Bench, list[Stamp]]:
    """Requests whose tables are there, but for the outcome (0, 31)."""
    bench = arrived(policy, **texts)
    stamps = [admit.stamp for admit in admitted(bench)]
    for stamp in stamps:
        bench.table(stamp, (0, 50), (1, 51))
    return bench, stamps


# ---- none -----------------------------------------------------------------------------------------------------------


def test_without_a_backup_a_miss_gets_nothing_and_asks_for_nothing() -> None:
    bench, _ = missed(Patient("none"))
    bench.guesses["a"] = [8, 9]
    assert bench.propose(bench.row("a", 31)) == [[]]
    assert wants(bench) == []
    assert bench.count() == {"not_predicted": 1}


# ---- n-gram ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "expected"), [(None, [8, 9, 10]), (2, [8, 9]), (0, [])])
def test_a_missed_row_gets_what_its_text_suggests(most: int | None, expected: list[int]) -> None:
    bench, (stamp,) = missed(Policy(K, "ngram", adaptive=False))
    bench.guesses["a"] = [8, 9, 10, 11, 12]
    assert bench.propose(bench.row("a", 31), most=most) == [expected]
    assert outcomes(bench) == [Outcome(stamp, 0, 31, 6, tuple(expected), 0)]
    assert bench.guessed == ([("a", K if most is None else most)] if expected else [])
    assert bench.count() == {"not_predicted": 1} | ({"ngram": 1} if expected else {})


def test_the_text_is_searched_only_after_a_miss_of_a_request_that_the_draft_side_has() -> None:
    bench = arrived(Policy(K, "ngram", adaptive=False), a=PROMPT, b=PROMPT, c=PROMPT)  # c has no slot
    for stamp in [admit.stamp for admit in admitted(bench)]:
        bench.table(stamp, (0, 31))
    bench.guesses = {"a": [8], "b": [9], "c": [10]}
    assert bench.propose(bench.row("a", 31), bench.row("b", 30), bench.row("c", 30)) == [[0, 1, 2], [9], []]
    assert bench.guessed == [("b", K)]


def test_a_text_that_suggests_nothing_is_a_miss_without_drafts() -> None:
    bench, _ = missed(Policy(K, "ngram", adaptive=False))
    assert bench.propose(bench.row("a", 31)) == [[]]
    assert bench.count() == {"not_predicted": 1}


def test_guesses_are_certain_drafts_and_are_judged_by_themselves() -> None:
    bench, _ = missed(Policy(K, "ngram", adaptive=False))
    bench.guesses["a"] = [8, 9]
    bench.propose(bench.row("a", 31))
    assert bench.speculator.proposals("a", 2) is None
    assert bench.channel.asked_q == []
    before = {source: bench.policy.reach(source) for source in Source}
    bench.propose(bench.row("a", 8, 9, 5, verified=2))
    assert bench.policy.reach(Source.NGRAM)[1] > before[Source.NGRAM][1]
    assert bench.policy.reach(Source.CACHE) == before[Source.CACHE]


def test_a_late_table_is_a_miss_that_n_grams_serve_as_well() -> None:
    bench = arrived(Policy(K, "ngram", adaptive=False))
    bench.guesses["a"] = [8]
    assert bench.propose(bench.row("a", 31)) == [[8]]
    assert bench.count() == {"late": 1, "ngram": 1}


# ---- just in time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "expected"), [(None, (70, 71, 72)), (2, (70, 71))])
def test_drafts_that_arrive_in_time_are_handed_over_and_the_outcome_carries_them(
    most: int | None, expected: tuple[int, ...]
) -> None:
    policy = Patient("jit")
    bench, (stamp,) = missed(policy)
    serving(bench)
    assert bench.propose(bench.row("a", 10, 31, verified=2), most=most) == [list(expected)]
    assert wants(bench) == [Want(stamp, 1, 31, len(expected))]
    assert outcomes(bench) == [Outcome(stamp, 1, 31, 7, expected, 2)]
    assert [bool(step.wants) for step in bench.channel.steps[-2:]] == [True, False], "first the want"
    assert bench.count() == {"not_predicted": 1, "jit": 1}
    assert policy.waited == [len(expected)]
    assert sum(bench.page.bins(counters.BACKUP_WAIT)) == 1
    bench.speculator.proposals("a", 2)
    assert bench.channel.asked_q == [(stamp, 99, 0, 2)], "of the table that came, not of the one before"


def test_drafts_just_in_time_are_judged_by_themselves() -> None:
    bench, _ = missed(Patient("jit"))
    serving(bench)
    bench.propose(bench.row("a", 31))
    before = {source: bench.policy.reach(source) for source in Source}
    bench.propose(bench.row("a", 70, 71, 5, verified=2))
    assert bench.policy.reach(Source.JIT)[1] > before[Source.JIT][1]
    assert bench.policy.reach(Source.CACHE) == before[Source.CACHE]


def test_the_target_waits_until_all_missed_rows_have_all_their_drafts() -> None:
    policy = Patient("jit")
    bench, stamps = missed(policy, a=PROMPT, b=PROMPT)
    depths = {stamp.slot: 0 for stamp in stamps}

    def grow(slot: int) -> None:
        """Every look finds one depth more; the second request begins when the first is done."""
        first, second = (stamp.slot for stamp in stamps)
        if wants(bench) and slot == first:
            growing = first if depths[first] < K else second
            depths[growing] = min(depths[growing] + 1, K)
            of = next(stamp for stamp in stamps if stamp.slot == growing)
            bench.table(of, (0, 31), depth=depths[growing], version=5)
        elif wants(bench) and depths[second] < K and depths[first] == K:
            depths[second] += 1
            bench.table(stamps[1], (0, 31), depth=depths[second], version=5)

    bench.channel.on_read = grow
    assert bench.propose(bench.row("a", 31), bench.row("b", 31)) == [[0, 1, 2], [0, 1, 2]]
    assert wants(bench) == [Want(stamp, 0, 31, K) for stamp in stamps]
    assert len([step for step in bench.channel.steps if step.wants]) == 1
    assert policy.waited == [K]
    assert bench.count() == {"not_predicted": 2, "jit": 2}


@pytest.mark.parametrize("mode", ["jit", "auto"])
def test_no_row_that_hit_waits(mode: str) -> None:
    bench, stamps = missed(Patient(mode), a=PROMPT, b=PROMPT)
    serving(bench)
    bench.table(stamps[1], (0, 31))
    assert bench.propose(bench.row("a", 31), bench.row("b", 31)) == [[], [0, 1, 2]]
    assert wants(bench) == []


@pytest.mark.parametrize("mode", ["jit", "auto"])
def test_nobody_waits_where_a_missed_row_could_not_go_on(mode: str) -> None:
    """One request's table is not there yet: the draft side could not begin at once."""
    bench, stamps = missed(Patient(mode), a=PROMPT, b=PROMPT)
    serving(bench)
    bench.table(Stamp(stamps[1].slot, stamps[1].generation, 7), (0, 50))
    assert bench.propose(bench.row("a", 31), bench.row("b", 31)) == [[], []]
    assert wants(bench) == []


def test_nobody_waits_where_the_draft_side_does_not_have_a_request() -> None:
    bench, _ = missed(Patient("jit"), a=PROMPT, b=PROMPT, c=PROMPT)
    serving(bench)
    assert bench.propose(bench.row("a", 31), bench.row("c", 31)) == [[], []]
    assert wants(bench) == []


def test_a_predicted_outcome_without_any_depth_yet_is_waited_for() -> None:
    bench = arrived(Patient("jit"))
    bench.table(admitted(bench)[0].stamp, (0, 31), depth=0)
    serving(bench)
    assert bench.propose(bench.row("a", 31)) == [[70, 71, 72]]
    assert bench.count() == {"late": 1, "jit": 1}


def test_a_piece_of_a_prompt_does_not_wait_and_is_not_waited_for() -> None:
    bench, _ = missed(Patient("jit"), a=PROMPT, b=PROMPT)
    serving(bench)
    assert bench.propose(bench.row("a", 31), bench.row("b")) == [[70, 71, 72], []]
    assert len(wants(bench)) == 1


def test_no_drafts_are_waited_for_where_none_may_be_verified() -> None:
    bench, _ = missed(Patient("jit"))
    serving(bench)
    assert bench.propose(bench.row("a", 31), most=0) == [[]]
    assert wants(bench) == []


def test_at_the_end_of_its_patience_it_takes_what_there_is() -> None:
    policy = Patient("jit", seconds=0.0)
    bench, (stamp,) = missed(policy)
    serving(bench, depth=1)
    assert bench.propose(bench.row("a", 31)) == [[70]]
    assert outcomes(bench) == [Outcome(stamp, 0, 31, 6, (70,), 0)]
    assert policy.waited == [1]


def test_at_the_end_of_its_patience_there_may_be_nothing() -> None:
    policy = Patient("jit", seconds=0.0)
    bench, (stamp,) = missed(policy)
    assert bench.propose(bench.row("a", 31)) == [[]]
    assert outcomes(bench) == [Outcome(stamp, 0, 31, 6, (), 0)]
    assert bench.count() == {"not_predicted": 1}
    assert policy.waited == [K], "so long for all of them, at least"


def test_drafts_of_another_outcome_or_round_are_not_taken_for_it() -> None:
    bench, (stamp,) = missed(Patient("jit", seconds=0.0))

    def answer(asked: Sequence[Want]) -> None:
        bench.table(stamp.next(), (0, 31))

    bench.channel.on_wants = answer
    assert bench.propose(bench.row("a", 31)) == [[]]


def not_waiting(bench: Bench) -> None:
    """From now on there is nothing to wait for: to look again and again is an error."""
    looks: list[int] = []

    def look(slot: int) -> None:
        looks.append(slot)
        assert len(looks) < 10

    bench.channel.on_read = look


def test_a_draft_side_that_ends_meanwhile_is_not_waited_for() -> None:
    bench, _ = missed(Patient("jit"))

    def end(asked: Sequence[Want]) -> None:
        bench.channel.alive = False
        not_waiting(bench)

    bench.channel.on_wants = end
    assert bench.propose(bench.row("a", 31)) == [[]]


def test_a_want_that_was_not_taken_is_not_waited_for() -> None:
    bench, _ = missed(Patient("jit"))
    bench.channel.taking = False
    not_waiting(bench)
    assert bench.propose(bench.row("a", 31)) == [[]]
    assert sum(bench.page.bins(counters.BACKUP_WAIT)) == 0


def test_a_want_that_was_not_taken_tells_nothing_of_the_time_it_takes() -> None:
    policy = Patient("jit")
    bench, _ = missed(policy)
    bench.channel.taking = False
    bench.propose(bench.row("a", 31))
    assert policy.waited == []


def hanging(backup: str = "jit") -> tuple[Bench, Patient]:
    """A draft side that has left a step unread for as long as many verify passes."""
    policy = Patient(backup, more=2)
    bench, _ = missed(policy)
    bench.channel.stalled_seconds = 5 * policy.verify_pass
    not_waiting(bench)
    return bench, policy


def test_a_draft_side_that_hangs_is_not_waited_for() -> None:
    bench, policy = hanging()
    serving(bench)
    assert bench.propose(bench.row("a", 31)) == [[]]
    assert wants(bench) == []
    assert policy.waited == []
    assert sum(bench.page.bins(counters.BACKUP_WAIT)) == 0


def test_one_that_hangs_is_not_waited_for_with_a_late_branch_either() -> None:
    bench, policy = hanging("auto")
    bench.table(admitted(bench)[0].stamp, (0, 31), depth=1)
    assert bench.propose(bench.row("a", 31)) == [[0]]
    assert wants(bench) == []
    assert policy.late == []


def test_one_that_is_in_a_forward_of_the_usual_length_is_waited_for() -> None:
    bench, policy = hanging()
    bench.channel.stalled_seconds = 3 * policy.verify_pass
    serving(bench)
    assert bench.propose(bench.row("a", 31)) == [[70, 71, 72]]


def test_a_draft_side_that_falls_silent_is_waited_for_once_at_most() -> None:
    """Its newest tables are of a round that is over: nobody waits for what cannot be gone on with."""
    policy = Patient("jit", seconds=0.0)
    bench, _ = missed(policy)
    for token in range(31, 36):
        bench.propose(bench.row("a", token))
    assert policy.waited == [K]


# ---- the rest of a late branch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "expected"), [(0, [0]), (1, [0, 71]), (2, [0, 71, 72])])
def test_the_only_request_of_a_step_may_wait_for_the_rest_of_its_branch(more: int, expected: list[int]) -> None:
    bench = arrived(Patient("auto", more=more))
    stamp = admitted(bench)[0].stamp
    bench.table(stamp, (0, 31), depth=1, version=4)

    def go_on(asked: Sequence[Want]) -> None:
        rows = [[0], [71], [72]][: asked[0].depth]
        bench.channel.tables[stamp.slot] = Table(stamp, [0], [31], rows, version=6)

    bench.channel.on_wants = go_on
    assert bench.propose(bench.row("a", 31)) == [expected]
    assert wants(bench) == ([Want(stamp, 0, 31, 1 + more)] if more else [])
    assert outcomes(bench)[0].speculation == tuple(expected)
    assert bench.count() == {"hits": 1, "late tables": 1}
    bench.speculator.proposals("a", 1)
    assert bench.channel.asked_q == [(stamp, 6 if more else 4, 0, 1)]
    before = bench.policy.reach(Source.CACHE)
    bench.propose(bench.row("a", 0, 5))
    assert bench.policy.reach(Source.CACHE)[0] > before[0], "it was a hit"


def test_what_a_late_branch_had_is_kept_where_the_rest_does_not_come() -> None:
    bench = arrived(Patient("auto", seconds=0.0, more=2))
    stamp = admitted(bench)[0].stamp
    bench.table(stamp, (0, 31), depth=1)

    def begin_anew(asked: Sequence[Want]) -> None:
        bench.channel.tables[stamp.slot] = Table(stamp, [0], [31], [], version=6)

    bench.channel.on_wants = begin_anew
    assert bench.propose(bench.row("a", 31)) == [[0]]
    bench.speculator.proposals("a", 1)
    assert bench.channel.asked_q == [(stamp, 0, 0, 1)]


def finishing(bench: Bench) -> None:
    """The draft side goes on with each wanted outcome, whose drafts were 0 .. already."""

    def go_on(asked: Sequence[Want]) -> None:
        for want in asked:
            rows = [[d] for d in range(want.depth)]
            bench.channel.tables[want.stamp.slot] = Table(want.stamp, [want.accepted], [want.bonus], rows, version=6)

    bench.channel.on_wants = go_on


def test_rows_that_are_all_late_wait_for_the_rest_of_their_branches_together() -> None:
    policy = Patient("auto", more=2)
    bench = arrived(policy, a=PROMPT, b=PROMPT)
    stamps = [admit.stamp for admit in admitted(bench)]
    for stamp in stamps:
        bench.table(stamp, (0, 31), depth=1)
    finishing(bench)
    assert bench.propose(bench.row("a", 31), bench.row("b", 31)) == [[0, 1, 2], [0, 1, 2]]
    assert wants(bench) == [Want(stamp, 0, 31, 3) for stamp in stamps]
    assert policy.late == [(2, 2.0)]
    assert bench.count() == {"hits": 2, "late tables": 2}


def test_late_rows_wait_beside_missed_ones_and_those_get_what_costs_no_time() -> None:
    bench = arrived(Patient("auto", more=2), a=PROMPT, b=PROMPT)
    late, other = [admit.stamp for admit in admitted(bench)]
    bench.table(late, (0, 31), depth=1)
    bench.table(other, (0, 99), depth=1)
    bench.guesses["b"] = [8]
    finishing(bench)
    rows = bench.propose(bench.row("a", 31), bench.row("b", 31))
    assert rows[0] == [0, 1, 2]
    assert wants(bench) == [Want(late, 0, 31, 3)]


def test_nobody_waits_for_the_rest_of_a_branch_where_a_row_has_all_its_drafts() -> None:
    bench = arrived(Patient("auto", more=2), a=PROMPT, b=PROMPT)
    late, whole = [admit.stamp for admit in admitted(bench)]
    bench.table(late, (0, 31), depth=1)
    bench.table(whole, (0, 31))
    finishing(bench)
    assert bench.propose(bench.row("a", 31), bench.row("b", 31)) == [[0], [0, 1, 2]]
    assert wants(bench) == []


def test_a_finished_branch_waits_for_nothing() -> None:
    bench = arrived(Patient("auto", more=2))
    bench.table(admitted(bench)[0].stamp, (0, 31))
    assert bench.propose(bench.row("a", 31)) == [[0, 1, 2]]
    assert wants(bench) == []
