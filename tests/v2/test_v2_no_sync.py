"""Nothing of ours in a step waits for the device: who goes and comes, `propose`, the draft, the marking of filler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.v2.sync_guard import Synchronised, no_sync
from tests.v2.v2_runs import V2Run

Wait = Callable[[torch.Tensor], Any]

READS: dict[str, Wait] = {
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
    "to the host": lambda t: t.to("cpu"),
}
COPIES: dict[str, Wait] = {
    "a number at places": lambda t: t.clone().__setitem__(t[:2], 3),
    "a number at places of one axis": lambda t: t.clone().view(2, 2).__setitem__((slice(None), t[:1]), 3),
    "a number at one place": lambda t: t.__setitem__(1, 3),
    "a tensor of the host's": lambda t: t.__setitem__(slice(2), torch.tensor([1, 2])),
    "a list as an index": lambda t: t[[0, 1]],
    "an array as an index": lambda t: t[np.array([0, 1])],
    "an index of the host's": lambda t: t[torch.tensor([0, 1])],
    "an index of the host's, to write": lambda t: t.__setitem__(torch.from_numpy(np.arange(2)), t[2:].clone()),
    "values for a device": lambda t: torch.tensor([1, 2], device=t.device),
    "an array for a device": lambda t: torch.as_tensor(np.arange(2), device=t.device),
    "values beside a tensor": lambda t: t.new_tensor([1, 2]),
    "values, sent": lambda t: torch.tensor([1, 2]).to(t.device),
    "a part of an array, sent": lambda t: torch.from_numpy(np.arange(4))[1:].to(t),
    "values, copied": lambda t: t.copy_(torch.tensor([1, 2, 3, 0])),
    "copied to the host": lambda t: torch.tensor([0] * 4).copy_(t),
}


@pytest.mark.parametrize("name", READS | COPIES)
def test_the_guard_trips_at(name: str) -> None:
    tensor, wait = torch.arange(4), (READS | COPIES)[name]
    with pytest.raises(Synchronised), no_sync([tensor]):
        wait(tensor)
    wait(tensor)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_seen_whoever_made_the_tensor(name: str) -> None:
    """The guard need not have been told of it: what is not known to be the host's is the device's."""
    with pytest.raises(Synchronised), no_sync([]):
        COPIES[name](torch.arange(4))


def test_the_guard_lets_through_what_only_enqueues() -> None:
    tensor, other = torch.arange(4), torch.arange(4)
    with no_sync([tensor]) as guard:
        tensor.index_copy_(0, tensor[:2].clone(), torch.where(tensor > 1, tensor, 0)[:2])
        torch.arange(2).repeat_interleave(tensor[2:], output_size=5)
        assert len(tensor) == 4
        assert other.tolist() == [0, 1, 2, 3], "what lies on the host may be read"
    assert guard.operations > 0


def test_the_guard_lets_through_what_needs_no_copy_or_does_not_wait_for_it() -> None:
    tensor = torch.arange(4)
    with no_sync([tensor]):
        tensor[1:3] = 3  # an argument of a kernel, as in the next three
        tensor[1].fill_(2)
        tensor.index_fill_(0, tensor[:1].clone(), 1)
        torch.where(tensor > 1, tensor, 0).masked_fill(tensor > 1, 7)
        tensor[tensor[:1].clone()] = tensor.new_full((), 2)
        sent = torch.tensor([1, 0]).to(tensor.device, non_blocking=True)
        tensor[sent] = tensor[2:].clone()
        tensor[:2].copy_(torch.from_numpy(np.arange(2)), non_blocking=True)
        host = torch.tensor([3, 4, 5])
        host[1] = host[torch.tensor([0, 1])].sum()
        assert host.tolist() == [3, 7, 5], "among themselves the host's tensors may do as they like"


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("name", ["guarded", "guarded, sampled"])
def test_no_step_waits_on_the_host(steady: tuple[V2Run, V2Run], name: str) -> None:
    guard = steady[1][name].guard
    assert guard["steps"] > 10
    assert guard["propose"] > 5
    assert guard["sampler"] > 5
    assert guard["operations"] > 10 * guard["propose"]


@pytest.mark.slow
@pytest.mark.engine
def test_no_ragged_step_waits_on_the_host(ragged: tuple[V2Run, V2Run, V2Run]) -> None:
    assert ragged[1]["guarded"].guard["propose"] > 20
    assert ragged[1]["guarded"].guard["steps"] > 40


@pytest.mark.slow
@pytest.mark.engine
def test_a_draft_that_reads_is_caught(ragged: tuple[V2Run, V2Run, V2Run]) -> None:
    assert ragged[2].answer["synchronised"] == "Tensor.tolist"
