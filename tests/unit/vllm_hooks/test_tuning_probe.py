"""What the probe notes is what happened, and the engine goes on as without it."""

from __future__ import annotations

from tests.unit.speculator_bench import PROMPT, K, admitted, arrived
from vllm_saguaro.vllm_hooks.tuning_probe import TuningProbe


def test_outcomes_drafts_passes_and_tables_are_noted() -> None:
    bench, untouched = arrived(), arrived()
    probe = TuningProbe(bench.speculator)
    for each in (bench, untouched):
        stamp = admitted(each)[0].stamp
        each.table(stamp, (0, 50), (0, 60))
        assert each.propose(each.row("a", 60), tokens_in=1) == [[10, 11, 12]]
        stamp = stamp.next()
        each.table(stamp, (1, 70))
        assert each.propose(each.row("a", 10, 70, verified=K), tokens_in=1 + K) == [[0, 1, 2]]
        each.table(stamp.next(), (2, 80))
        assert each.propose(each.row("a", 7), tokens_in=1) == [[]]
    found = probe.take()
    assert dict(found.ranks) == {1: 1, 0: 1}
    assert found.not_predicted == 1
    assert (found.tried, found.accepted) == ([1, 1], [1, 0])
    assert found.tables == {(1, K): [0.003, 0.003]}
    assert [key for key, times in found.passes.items() for _ in times] == [(1, 1 + K), (1, 1)]
    assert bench.count() == untouched.count()


def test_a_step_with_prefill_is_no_pass() -> None:
    bench = arrived()
    probe = TuningProbe(bench.speculator)
    bench.propose(bench.row("a", 60), tokens_in=1)
    bench.propose(bench.row("a", 61), tokens_in=None)
    assert probe.take().passes == {}


def test_what_was_taken_is_not_there_again() -> None:
    bench = arrived(a=PROMPT, b=PROMPT)
    probe = TuningProbe(bench.speculator)
    bench.table(admitted(bench)[0].stamp, (0, 50))
    bench.propose(bench.row("a", 50), bench.row("b", 50))
    assert probe.take().outcomes == 1
    assert probe.take().outcomes == 0
