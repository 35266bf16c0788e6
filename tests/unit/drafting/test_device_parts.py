"""The small parts of the device engine: buckets, blocks by slot, maps, seeds, late lengths, captured calls."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_saguaro.algorithm.calibration import BINS, Calibration, Event, class_of
from vllm_saguaro.algorithm.sampling import SamplingRows
from vllm_saguaro.drafting.buckets import (
    Bucket,
    branches_for,
    bucket_of,
    buckets,
    default_branches,
    most_rows_first,
)
from vllm_saguaro.drafting.device_blocks import BlockLedger, private_blocks
from vllm_saguaro.drafting.device_drawing import Rule, draw, seeds
from vllm_saguaro.drafting.device_maps import AcceptanceMaps
from vllm_saguaro.drafting.graphs import CapturedCalls
from vllm_saguaro.drafting.late_lengths import GIVEN_UP, LateLengths
from vllm_saguaro.messages import Sampling

CPU = torch.device("cpu")

# ---- buckets --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 1024), st.integers(1, 64))
def test_every_batch_has_a_bucket_with_rows_in_bounds(slots: int, branches: int) -> None:
    found = buckets(slots, branches)
    assert [b.batch for b in found] == sorted({b.batch for b in found})
    assert found[-1].batch == slots
    for batch in range(1, slots + 1):
        bucket = bucket_of(found, batch)
        assert batch <= bucket.batch < 2 * batch or bucket.batch == slots
        assert 1 <= bucket.branches <= branches
        assert bucket.rows <= max(256, bucket.batch)


def test_a_request_that_is_alone_has_all_branches_and_many_have_one_each() -> None:
    assert default_branches(4) == 20
    assert branches_for(1, 20) == 20
    assert branches_for(64, 20) == 4
    assert branches_for(1000, 20) == 1
    assert buckets(6, 20) == [Bucket(1, 20), Bucket(2, 20), Bucket(4, 20), Bucket(6, 20)]


@given(st.integers(1, 1024), st.integers(1, 64))
def test_the_most_rows_are_seen_first_and_no_bucket_is_left_out(slots: int, branches: int) -> None:
    found = buckets(slots, branches)
    ordered = most_rows_first(found)
    assert sorted(ordered, key=lambda b: b.batch) == found
    assert all(one.rows >= other.rows for one, other in itertools.pairwise(ordered))


def test_the_largest_batch_need_not_have_the_most_rows() -> None:
    assert most_rows_first(buckets(20, 20))[:2] == [Bucket(16, 16), Bucket(20, 12)]
    assert most_rows_first(buckets(96, 20))[0].rows == 256 > buckets(96, 20)[-1].rows


# ---- blocks ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 200), st.integers(0, 6))
def test_a_round_touches_no_entry_beyond_those_needed(size: int, drafts: int, length: int, k: int) -> None:
    ledger = BlockLedger(10, size, 10_000, drafts)
    needed, last = ledger.needed(length), length - 1
    assert (last // size) + private_blocks(size, drafts) <= needed, "what is adopted"
    assert (last + drafts) // size < needed, "the glue token"
    start = length + min(k, drafts)
    assert start % size == 0 or start // size < needed, "the block that a branch copies"


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 50))
def test_a_branch_owns_enough_blocks_wherever_it_begins(size: int, drafts: int, start: int) -> None:
    assert (start + drafts - 1) // size - start // size + 1 <= private_blocks(size, drafts)


def test_a_slot_gets_all_back_and_as_many_branches_as_there_is_room_for() -> None:
    ledger = BlockLedger(20, 4, 64, 3)  # a branch owns 2
    holding = ledger.admit(0, 9, 30)
    assert holding is not None
    assert len(holding.main) == 4
    assert len(holding.private) == 14
    assert ledger.admit(1, 1, 1) is None
    assert ledger.grow(0, 40) is None
    assert ledger.num_free == 1
    assert ledger.grow(0, 13) == (4, [19])
    ledger.release(0)
    ledger.release(0)
    assert ledger.num_free == 19


def test_blocks_ahead_are_given_where_there_are_plenty() -> None:
    ledger = BlockLedger(200, 4, 64, 3)
    ledger.admit(0, 4, 2)
    first, more = ledger.grow(0, 16) or (0, [])
    assert (first, len(more)) == (2, 6)
    assert ledger.grow(0, 28) == (8, [])
    assert len((ledger.grow(0, 64) or (0, []))[1]) == 16 - 8  # no more than a table has entries


# ---- maps -----------------------------------------------------------------------------------------------------------


def test_maps_without_events_say_what_the_prior_says() -> None:
    maps, cls = AcceptanceMaps(CPU), torch.tensor([class_of(0.0, False, True, False)])
    raw = torch.tensor([[0.01, 0.3, 0.9, 0.999]])
    from vllm_saguaro.algorithm.calibration import apply

    torch.testing.assert_close(maps.probability(cls, raw), apply(Calibration().table(), cls, Event.ACCEPTANCE, raw))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_maps_learn_what_the_host_learns(seed: int) -> None:
    rng, cls = np.random.default_rng(seed), class_of(0.8, False, False, False)
    host, maps = Calibration(memory=300), AcceptanceMaps(CPU, memory=300)
    for _ in range(40):
        raw = rng.random((6, 4)).astype(np.float32) ** rng.integers(1, 6)
        happened = rng.random((6, 4)) < np.sqrt(raw)
        counts = rng.random((6, 4)) < 0.7
        host.learn(cls, Event.ACCEPTANCE, raw[counts], happened[counts])
        tensors = (torch.from_numpy(x) for x in (raw, happened, counts))
        maps.learn(torch.full((6,), cls), *tensors)
    x = torch.linspace(0.001, 0.999, 200).unsqueeze(0)
    from vllm_saguaro.algorithm.calibration import apply

    row = torch.tensor([cls])
    expected = apply(host.table(), row, Event.ACCEPTANCE, x)
    torch.testing.assert_close(maps.probability(row, x), expected, atol=2e-3, rtol=2e-2)
    assert (maps.probability(row, x).diff() >= 0).all()


def test_maps_learn_nothing_of_rows_that_do_not_count() -> None:
    maps = AcceptanceMaps(CPU)
    row, raw = torch.tensor([3]), torch.tensor([[0.5, 0.5]])
    before = maps.probability(row, raw)
    maps.learn(row, raw, torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.bool))
    torch.testing.assert_close(maps.probability(row, raw), before, atol=1e-3, rtol=0.05)
    assert BINS > 2


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_no_two_seeds_are_equal() -> None:
    seen = set[int]()
    for round_ in range(3):
        for depth in range(4):
            found = seeds(2**62 + 12345, torch.tensor([1, 2, 3]), torch.full((3,), round_), 20, depth)
            assert found.shape == (60,)
            seen |= set(found.tolist())
    assert len(seen) == 3 * 4 * 60


# ---- what is drawn from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("c", [1.0, 0.5])
def test_logits_that_are_no_numbers_give_a_certain_draft_and_no_other_row_changes(bad: float, c: float) -> None:
    """A q that is none would have the verifier draw from nothing: the text would be the draft's fault."""
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    rows = SamplingRows.of([Sampling(temperature=0.8, top_p=0.9)] * 3, "cpu")
    no, seed = torch.zeros(3, dtype=torch.bool), torch.tensor([5, 6, 7])
    rule = Rule(rows, no, noisy=no, seed=seed, c=c)
    sound = draw(logits, rule, seed, fan_out=2)
    logits[1] = bad
    drawn = draw(logits, rule, seed, fan_out=2)
    assert drawn.log_q[1].tolist() == [0.0] + [-math.inf] * 63
    assert drawn.token[1] == drawn.tokens[1, 0]
    assert 0 <= int(drawn.token[1]) < 200
    for other in (0, 2):
        assert drawn.token[other] == sound.token[other]
        assert drawn.log_q[other].equal(sound.log_q[other])


# ---- lengths that come late -----------------------------------------------------------------------------------------


class Queue:
    """Marks that are reached when the test says so."""

    def __init__(self) -> None:
        self.done = 0
        self.made = 0

    def mark(self) -> Any:
        self.made += 1
        number = self.made
        return mock.Mock(reached=lambda: self.done >= number)


def test_lengths_come_when_they_are_there_and_say_of_which_step_they_are() -> None:
    queue, length = Queue(), torch.tensor([5, 6, 7], dtype=torch.int32)
    alive = torch.tensor([True, True, True])
    late = LateLengths(length, alive, queue.mark)
    late.send([0, 2])
    length += 10
    alive[2] = False
    late.send([0, 2])
    assert late.news() == []
    queue.done = 1
    assert late.news() == [(0, 5, 1), (2, 7, 1)]
    queue.done = 2
    assert late.news() == [(0, 15, 2), (2, GIVEN_UP, 2)]


def test_where_nothing_arrives_nothing_more_is_sent_and_steps_are_still_counted() -> None:
    queue, length = Queue(), torch.tensor([5], dtype=torch.int32)
    late = LateLengths(length, torch.tensor([True]), queue.mark, copies=2)
    for _ in range(5):
        late.send([0])
        length += 1
    queue.done = 9
    assert late.news() == [(0, 5, 1), (0, 6, 2)]
    late.send([0])
    queue.done = 10
    assert late.news() == [(0, 10, 6)]


# ---- captured calls -------------------------------------------------------------------------------------------------


def test_a_call_without_a_graph_is_made() -> None:
    made: list[int] = []
    CapturedCalls(CPU).run("a", lambda: made.append(1))
    assert made == [1]


def test_a_call_is_prepared_and_warmed_up_before_it_is_captured_and_then_replayed() -> None:
    """Against stand-ins for CUDA: the order of things alone."""
    done: list[str] = []
    graph, stream = mock.Mock(replay=lambda: done.append("replay")), mock.Mock()
    stream.synchronize = lambda: done.append("wait")
    cuda: dict[str, Any] = {
        "graph_pool_handle": mock.Mock(return_value=(0, 7)),
        "stream": lambda s: nullcontext(),
        "CUDAGraph": lambda: graph,
        "graph": mock.Mock(return_value=nullcontext()),
    }
    with mock.patch.multiple(torch.cuda, **cuda):
        calls = CapturedCalls(CPU)
        for _ in range(2):  # the second time it is there already
            calls.capture("a", lambda: done.append("call"), lambda: done.append("prepare"), stream)
        assert done == ["prepare", "call", "wait", "prepare", "call"]
        assert cuda["graph"].call_args.kwargs["pool"] == (0, 7)
        assert cuda["graph"].call_args.kwargs["stream"] is stream
        calls.capture("b", lambda: None, lambda: None, stream)
        assert cuda["graph_pool_handle"].call_count == 1
    calls.run("a", lambda: done.append("call"))
    assert done[-1] == "replay"
    assert "a" in calls
    calls.clear()
    assert "a" not in calls


@pytest.mark.parametrize("method", ["guess", ""])
def test_an_unknown_method_is_refused(method: str) -> None:
    from tests.unit.drafting.device_driver import World
    from tests.unit.drafting.fake_device_model import FakeDeviceModel

    with pytest.raises(ValueError, match=r"^the method .* is none of coupled, probabilistic, greedy$"):
        World(FakeDeviceModel(), method=method)
