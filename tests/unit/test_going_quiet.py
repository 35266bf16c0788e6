"""Where drafting does not pay, the target side lets the draft side forget everything, and takes it up again later."""

from __future__ import annotations

import pytest

from tests.unit.speculator_bench import PROMPT, Bench, K, admitted, arrived, outcomes, released
from vllm_saguaro import counters
from vllm_saguaro.policy import Policy


class Scripted(Policy):
    """Goes quiet when it is told to, for so many steps."""

    def __init__(self) -> None:
        super().__init__(K, "none")
        self.left = 0
        self.in_vain = False

    @property
    def quiet(self) -> bool:
        return self.left > 0

    def resting(self, rows: int) -> bool:
        rests = self.left > 0
        self.left -= rests
        return rests

    def drafts(self, rows: int, sampled: int = 0) -> int:
        if self.in_vain:
            self.in_vain, self.left = False, 2
            return 0
        return K


def going_quiet() -> tuple[Bench, Scripted]:
    """Two requests with their tables, at the step that finds that drafts do not pay."""
    policy = Scripted()
    bench = arrived(policy, a=PROMPT, b=PROMPT)
    for admit in admitted(bench):
        bench.table(admit.stamp, (0, 31))
    policy.in_vain = True
    assert bench.propose(bench.row("a", 31), bench.row("b", 31)) == [[], []]
    return bench, policy


def test_all_requests_are_released_and_their_outcome_told_before() -> None:
    bench, _ = going_quiet()
    stamps = [admit.stamp for admit in admitted(bench)]
    assert [outcome.stamp for outcome in outcomes(bench)] == stamps
    assert sorted(released(bench), key=lambda stamp: stamp.slot) == sorted(
        [stamp.next() for stamp in stamps], key=lambda stamp: stamp.slot
    )


def test_a_quiet_step_tells_nothing_and_looks_nothing_up() -> None:
    bench, _ = going_quiet()
    told, counted = len(bench.channel.steps), bench.count()
    reads: list[int] = []
    bench.channel.on_read = reads.append
    for token in (32, 33):
        bench.speculator.begin_step([], [])
        assert bench.propose(bench.row("a", token), bench.row("b", token)) == [[], []]
        assert bench.speculator.proposals("a", 1) is None
    assert (len(bench.channel.steps), bench.count(), reads, bench.asked) == (told, counted, [], [])
    assert bench.page.value(counters.QUIET_STEPS) == 2


def test_a_request_that_comes_while_it_is_quiet_is_not_admitted() -> None:
    bench, _ = going_quiet()
    told = len(bench.channel.steps)
    bench.arrive("c")
    assert len(bench.channel.steps) == told
    bench.speculator.begin_step([], ["c", "a"])
    assert len(bench.channel.steps) == told, "it has been released already"


def test_when_it_wakes_all_are_learnt_anew_with_the_text_of_now() -> None:
    bench, _ = going_quiet()
    for token in (32, 33):
        bench.propose(bench.row("a", token), bench.row("b", token))
    bench.propose(bench.row("a", 34), bench.row("b", 35))
    new = admitted(bench)[2:]
    assert [admit.token_ids for admit in new] == [(*PROMPT, 31, 32, 33, 34), (*PROMPT, 31, 32, 33, 35)]
    assert sorted(admit.stamp.slot for admit in new) == [0, 1]
    assert not {admit.stamp for admit in new} & {admit.stamp for admit in admitted(bench)[:2]}
    for admit in new:
        bench.table(admit.stamp, (0, 36))
    assert bench.propose(bench.row("a", 36), bench.row("b", 36)) == [[0, 1, 2], [0, 1, 2]]
    assert bench.page.value(counters.QUIET_STEPS) == 2


def test_steps_with_no_draft_worth_verifying_are_not_quiet_yet() -> None:
    class Doubting(Policy):
        def drafts(self, rows: int, sampled: int = 0) -> int:
            return 0

    bench = arrived(Doubting(K, "jit"))
    stamp = admitted(bench)[0].stamp
    for token in (31, 32):
        bench.table(stamp, (0, token))
        assert bench.propose(bench.row("a", token)) == [[]]
        stamp = stamp.next()
    assert released(bench) == []
    assert bench.count() == {"hits": 2}
    assert bench.page.value(counters.QUIET_STEPS) == 0
    assert bench.page.value(counters.DRAFTS) == 0


def test_one_line_says_so_however_often(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    bench, policy = going_quiet()
    for _ in range(2):
        for token in (32, 33, 34):
            bench.propose(bench.row("a", token), bench.row("b", token))
        policy.in_vain = True
        bench.propose(bench.row("a", 35), bench.row("b", 35))
    lines = [record.getMessage() for record in caplog.records if "drafts cost more" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("At 2 running requests")


def test_a_quiet_step_is_measured_like_any_other() -> None:
    """Else nothing would be known of plain decoding when drafting is tried again."""
    bench, _ = going_quiet()
    before = sum(bench.page.bins(counters.VERIFY))
    bench.propose(bench.row("a", 32), bench.row("b", 32), tokens_in=2)
    assert sum(bench.page.bins(counters.VERIFY)) == before + 1
