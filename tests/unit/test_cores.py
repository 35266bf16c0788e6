from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saguaro import cores
from vllm_saguaro.cores import CorePlan, format_cpus, parse_cpus, plan_cores, plan_ranks, shared_out

cpu_sets = st.sets(st.integers(0, 300), min_size=1, max_size=40)


@given(cpu_sets)
def test_what_is_formatted_is_parsed_back(cpus: set[int]) -> None:
    assert parse_cpus(format_cpus(tuple(cpus))) == tuple(sorted(cpus))


@pytest.mark.parametrize(
    ("text", "cpus"), [("0", (0,)), ("0,2-4", (0, 2, 3, 4)), (" 3 , 1-2", (1, 2, 3)), ("5-5", (5,)), ("1,1-2", (1, 2))]
)
def test_lists_of_cores_are_read(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


def test_runs_of_cores_are_written_as_ranges() -> None:
    assert format_cpus((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"


@pytest.mark.parametrize("text", ["", ",", "a", "1-", "-1", "3-1", "1,,2", "1.5", "0x1", "1-2-3", "²"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="write for example"):
        parse_cpus(text)


@pytest.mark.parametrize(("count", "draft"), [(2, 1), (4, 1), (8, 1), (15, 1), (16, 2), (64, 8)])
def test_the_draft_gets_the_last_eighth_and_at_least_one_core(count: int, draft: int) -> None:
    plan = plan_cores(range(count), None)
    assert plan.draft == tuple(range(count - draft, count))
    assert plan.target == tuple(range(count - draft))
    assert plan.bind_target


def test_with_one_core_both_sides_share_it_and_say_so() -> None:
    plan = plan_cores([5], None)
    assert plan == CorePlan((5,), (5,))
    assert "share" in plan.describe()
    assert plan_cores([5], "5") == plan


@given(cpu_sets.filter(lambda cpus: len(cpus) > 1))
def test_where_there_are_two_cores_the_sides_are_disjoint_and_use_all(cpus: set[int]) -> None:
    plan = plan_cores(tuple(cpus), None)
    assert plan.target
    assert plan.draft
    assert not set(plan.target) & set(plan.draft)
    assert set(plan.target) | set(plan.draft) == cpus


def test_the_users_choice_is_the_drafts_and_the_rest_the_targets() -> None:
    assert plan_cores(range(8), "2-3,6") == CorePlan((0, 1, 4, 5, 7), (2, 3, 6))


@pytest.mark.parametrize(
    ("choice", "message"), [("8", "names cores"), ("0-8", "names cores"), ("0-7", "no core to the target")]
)
def test_an_impossible_choice_is_refused(choice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_cores(range(8), choice)


def test_what_the_user_bound_the_target_to_stays() -> None:
    plan = plan_cores(range(8), None, target_cpus=(0, 1, 2))
    assert plan == CorePlan((0, 1, 2), (3, 4, 5, 6, 7), bind_target=False)
    assert plan_cores(range(8), "7", target_cpus=(0, 1, 2)) == CorePlan((0, 1, 2), (7,), bind_target=False)


def test_a_target_bound_to_everything_shares() -> None:
    assert plan_cores(range(4), None, target_cpus=range(4)).draft == (0, 1, 2, 3)


def test_a_plan_is_plain_values() -> None:
    one = {"target": [0], "draft": [1], "bind_target": True, "ranks": [], "ranks_a_node": 1}
    assert plan_cores(range(2), None).to_dict() == one
    assert plan_ranks([range(3)], 2, None).to_dict() == one | {
        "target": [0, 1],
        "draft": [2],
        "ranks": [[0], [1]],
        "ranks_a_node": 2,
    }


def test_one_cpu_a_core_keeps_some_of_the_allowed() -> None:
    allowed = cores.allowed_cpus()
    chosen = cores.one_cpu_a_core(allowed)
    assert chosen
    assert set(chosen) <= set(allowed)


def test_the_front_end_plans_with_what_is_allowed_here() -> None:
    environment: dict[str, str] = {}
    plan = cores.apply_in_frontend(None, environment)
    assert {*plan.target, *plan.draft} <= set(cores.allowed_cpus())


def test_the_front_end_keeps_the_users_binding() -> None:
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0-1|2"}
    plan = cores.apply_in_frontend(None, environment)
    assert (plan.target, plan.bind_target) == ((0, 1, 2), False)
    assert environment == {"VLLM_CPU_OMP_THREADS_BIND": "0-1|2"}


def test_the_front_end_binds_nothing_where_the_user_says_so() -> None:
    assert not cores.apply_in_frontend(None, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}).bind_target


def test_a_draft_process_does_not_inherit_the_targets_binding() -> None:
    parent = {"OMP_PLACES": "{0}", "OMP_PROC_BIND": "close", "OMP_NUM_THREADS": "7", "HOME": "here"}
    child = cores.draft_environment(parent, (4, 5))
    assert child == {"HOME": "here", "OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    assert parent["OMP_NUM_THREADS"] == "7"


def test_pinning_holds_for_the_calling_thread() -> None:
    allowed = cores.allowed_cpus()
    try:
        cores.pin(allowed[:1])
        assert cores.allowed_cpus() == allowed[:1]
    finally:
        os.sched_setaffinity(0, allowed)


def test_a_process_is_born_with_its_cores_and_who_starts_it_is_not_moved_to_them() -> None:
    allowed = os.sched_getaffinity(0)
    mine, its = min(allowed), max(allowed)
    own = [sys.executable, "-S", "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    try:
        os.sched_setaffinity(0, {mine})
        with cores.born_on([its]):
            assert os.sched_getaffinity(0) == {mine, its}
            born = subprocess.run(own, capture_output=True, text=True, check=True).stdout
        assert born.strip() == str(sorted({mine, its}))
        assert os.sched_getaffinity(0) == {mine}
        with cores.born_on(()):
            assert os.sched_getaffinity(0) == {mine}
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("flags", "slow"), [("avx2", True), ("avx512_bf16", False), ("amx_bf16 avx2", False), ("", False)]
)
def test_bfloat16_is_slow_where_an_x86_processor_emulates_it(flags: str, slow: bool) -> None:
    assert cores.bf16_is_slow(frozenset(flags.split())) is slow


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_each_rank_gets_as_many_cores_and_the_draft_the_rest_of_the_first_node() -> None:
    plan = plan_ranks([range(8)], 2, None)
    assert (plan.ranks, plan.draft, plan.ranks_a_node) == (((0, 1, 2), (3, 4, 5)), (7,), 2)
    assert plan.target == (0, 1, 2, 3, 4, 5)
    assert plan.describe() == "target on cores 0-2|3-5, draft on cores 7"


def test_ranks_are_on_nodes_of_their_own_where_there_are_enough() -> None:
    plan = plan_ranks([range(16), range(16, 32), range(32, 48)], 2, None)
    assert (plan.ranks, plan.draft, plan.ranks_a_node) == ((tuple(range(14)), tuple(range(16, 30))), (14, 15), 1)


def test_several_ranks_a_node_do_not_straddle() -> None:
    plan = plan_ranks([(0, 1, 2, 3, 4), (5, 6, 7, 8)], 3, None)
    assert (plan.ranks, plan.draft, plan.ranks_a_node) == (((0, 1), (5, 6), (2, 3)), (4,), 2)


@pytest.mark.parametrize(
    ("count", "reserved", "ranks"),
    [
        (5, 1, ((0,), (1,))),
        (6, 1, ((0, 1), (2, 3))),
        (3, 1, ((0,), (1,))),
        (7, 2, ((0, 1), (2, 3))),
        (8, 5, ((0,), (1,))),
    ],
)
def test_cores_are_kept_free_as_long_as_each_rank_has_one(
    count: int, reserved: int, ranks: tuple[tuple[int, ...], ...]
) -> None:
    assert plan_ranks([range(count)], 2, None, reserved).ranks == ranks


def test_without_a_core_beyond_one_a_rank_the_draft_shares_and_says_so() -> None:
    plan = plan_ranks([(3, 5)], 2, None)
    assert (plan.ranks, plan.draft) == (((3,), (5,)), (5,))
    assert "the draft shares 5" in plan.describe()


def test_ranks_share_cores_where_there_are_fewer() -> None:
    assert plan_ranks([(4,)], 2, None).ranks == ((4,), (4,))
    assert plan_ranks([(4, 6)], 3, "6").ranks == ((4,), (6,), (4,))


def test_the_users_choice_for_the_draft_is_kept_from_the_ranks() -> None:
    plan = plan_ranks([range(6)], 2, "0,2")
    assert (plan.ranks, plan.draft) == (((1, 3), (4, 5)), (0, 2))
    elsewhere = plan_ranks([(0, 1), (2, 3), (4, 5)], 2, "4")
    assert (elsewhere.ranks, elsewhere.draft) == (((0, 1), (2, 3)), (4,))


@pytest.mark.parametrize(("choice", "message"), [("8", "names cores"), ("1-2", "no core each to the target's 2 ranks")])
def test_a_choice_that_leaves_a_rank_nothing_is_refused(choice: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_ranks([range(3)], 2, choice)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(2, 8), st.integers(0, 2))
def test_ranks_are_alike_and_disjoint_wherever_there_are_cores(sizes: list[int], ranks: int, reserved: int) -> None:
    starts = [sum(sizes[:at]) for at in range(len(sizes))]
    nodes = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    plan = plan_ranks(nodes, ranks, None, reserved)
    assert len({len(part) for part in plan.ranks}) == 1
    assert len(plan.ranks) == ranks
    used = nodes[:ranks]
    seats = [len(range(at, ranks, len(used))) for at in range(len(used))]
    for rank, part in enumerate(plan.ranks):
        assert set(part) <= set(used[rank % len(used)])
    if all(len(node) >= seat for node, seat in zip(used, seats, strict=True)):
        assert sum(map(len, plan.ranks)) == len(plan.target)
    if len(used[0]) > seats[0] and all(len(node) >= seat for node, seat in zip(used, seats, strict=True)):
        assert not set(plan.target) & set(plan.draft)


def test_the_front_end_binds_each_rank_and_takes_it_back() -> None:
    environment: dict[str, str] = {}
    plan = cores.apply_in_frontend(None, environment, ranks=2)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "|".join(map(format_cpus, plan.ranks))
    assert len(plan.ranks) == 2
    cores.undo_in_frontend(environment)
    assert environment == {}


def test_cpus_by_node_are_all_that_were_given() -> None:
    allowed = cores.allowed_cpus()
    assert sorted(cpu for node in cores.by_node(allowed) for cpu in node) == list(allowed)
    assert cores.by_node([60000, 60001]) == [(60000, 60001)]


@pytest.mark.parametrize(
    ("cpus", "drafts", "expected"),
    [
        ((4, 5, 6, 7), 1, [(4, 5, 6, 7)]),
        ((4, 5, 6, 7), 2, [(4, 5), (6, 7)]),
        ((4, 5, 6, 7, 8), 2, [(4, 5), (6, 7, 8)]),
        ((4, 5), 2, [(4,), (5,)]),
        ((4, 5), 3, [(4,), (5,), (4,)]),
        ((1,), 2, [(1,), (1,)]),
    ],
)
def test_several_drafts_share_the_drafts_cores(
    cpus: tuple[int, ...], drafts: int, expected: list[tuple[int, ...]]
) -> None:
    assert shared_out(cpus, drafts) == expected


@pytest.mark.parametrize(("cpus", "drafts", "expected"), [(16, 1, 2), (16, 3, 3), (4, 3, 2), (2, 2, 1), (1, 2, 1)])
def test_each_of_several_drafts_gets_a_core_if_that_leaves_the_target_half(
    cpus: int, drafts: int, expected: int
) -> None:
    assert len(plan_cores(range(cpus), None, drafts=drafts).draft) == expected
