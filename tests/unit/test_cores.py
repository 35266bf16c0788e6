from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_saguaro import cores
from vllm_saguaro.cores import CorePlan, format_cpus, parse_cpus, plan_cores

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
    assert plan_cores(range(2), None).to_dict() == {"target": [0], "draft": [1], "bind_target": True}


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


@pytest.mark.parametrize(
    ("flags", "slow"), [("avx2", True), ("avx512_bf16", False), ("amx_bf16 avx2", False), ("", False)]
)
def test_bfloat16_is_slow_where_an_x86_processor_emulates_it(flags: str, slow: bool) -> None:
    assert cores.bf16_is_slow(frozenset(flags.split())) is slow
