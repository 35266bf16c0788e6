"""Nothing in `propose`, the draft's part of it, or the marking of filler waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.v2.sync_guard import Synchronised, no_sync
from tests.v2.v2_runs import V2Run

Read = Callable[[torch.Tensor], Any]

READS: dict[str, Read] = {
    "item": lambda t: t[0].item(),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "cpu": lambda t: t.cpu(),
    "bool": lambda t: bool(t[0] > 0),
    "int": lambda t: int(t[0]),
    "index": lambda t: range(t[0]),
    "nonzero": lambda t: t.nonzero(),
    "a mask": lambda t: t[t > 0],
    "a masked write": lambda t: t.clone().__setitem__(t > 0, 1),
    "of a result": lambda t: (t * 2 + 1).cumsum(0)[-1].item(),
    "of a view": lambda t: t.view(2, 2)[0].tolist(),
    "lengths of repeats": lambda t: torch.arange(4).repeat_interleave(t),
}


@pytest.mark.parametrize("name", READS)
def test_the_guard_trips_at(name: str) -> None:
    tensor = torch.arange(4)
    with pytest.raises(Synchronised), no_sync([tensor]):
        READS[name](tensor)
    READS[name](tensor)


def test_the_guard_lets_through_what_only_enqueues() -> None:
    tensor, other = torch.arange(4), torch.arange(4)
    with no_sync([tensor]) as guard:
        tensor.index_copy_(0, tensor[:2].clone(), torch.where(tensor > 1, tensor, 0)[:2])
        torch.arange(2).repeat_interleave(tensor[2:], output_size=5)
        assert len(tensor) == 4
        assert other.tolist() == [0, 1, 2, 3], "what lies on the host may be read"
    assert guard.operations > 0


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("name", ["guarded", "guarded, sampled"])
def test_no_step_reads_on_the_host(steady: tuple[V2Run, V2Run], name: str) -> None:
    guard = steady[1][name].guard
    assert guard["propose"] > 5
    assert guard["sampler"] > 5
    assert guard["operations"] > 10 * guard["propose"]


@pytest.mark.slow
@pytest.mark.engine
def test_no_ragged_step_reads_on_the_host(ragged: tuple[V2Run, V2Run, V2Run]) -> None:
    assert ragged[1]["guarded"].guard["propose"] > 20


@pytest.mark.slow
@pytest.mark.engine
def test_a_draft_that_reads_is_caught(ragged: tuple[V2Run, V2Run, V2Run]) -> None:
    assert ragged[2].answer["synchronised"] == "Tensor.tolist"
