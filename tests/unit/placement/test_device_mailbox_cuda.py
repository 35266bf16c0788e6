"""`MailboxDraft` on a GPU: registered memory, kernels that read it, copies into it. Nothing here runs without one."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.unit.placement.device_sides import SAMPLED, SHAPE, HostChannel, SmallTarget, outcomes_of
from vllm_saguaro.kernels.operations import operations_for
from vllm_saguaro.placement.device_mailbox import MailboxDraft
from vllm_saguaro.placement.registered_memory import RegisteredMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
PROMPT = [3, 1, 4, 1, 5, 9]


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def test_kernels_see_what_the_host_writes_and_the_host_sees_copies() -> None:
    memory = RegisteredMemory(memoryview(bytearray(1 << 16)), gpu())
    memory.host[100] = 7
    assert int(memory.seen[100]) == 7
    assert memory.seen.device.type == "cuda"
    memory.host[200:203].copy_(torch.tensor([1, 2, 3], device=gpu()), non_blocking=True)
    torch.cuda.synchronize()
    assert memory.host[200:203].tolist() == [1, 2, 3]
    memory.close()


def test_hits_lives_and_q_as_on_the_cpu() -> None:
    channel = HostChannel(max_length=200)
    draft = MailboxDraft(channel, SHAPE, gpu(), operations_for(gpu()), logging.getLogger("test"))
    draft.wait_until_ready()
    target = SmallTarget(draft, device=gpu())
    for life in range(3):
        for slot in (2, 0):
            target.admit(slot, [life, slot, *PROMPT])
        before = target.hits
        for _ in range(8):
            channel.work()
            target.step()
            torch.cuda.synchronize()
        assert target.hits > before + 9
        draft.admit(1, "s", PROMPT, SAMPLED)
        channel.work()
        table = channel.read(1)
        assert table is not None
        outcomes = outcomes_of([(1, table.accepted[2], table.bonus[2], 7)], 0.8, gpu())
        q = channel.proposals(table.stamp, table.version, 2, 3)
        assert q is not None
        logits = torch.zeros(SHAPE.slots, 3, 40, device=gpu())
        draft.logits_into(outcomes, draft.exchange(outcomes), logits)
        expected = torch.zeros(3, 40).scatter_(1, torch.from_numpy(q.tokens).long(), torch.from_numpy(q.probabilities))
        torch.testing.assert_close((logits[1] / 0.8).softmax(-1).cpu(), expected)
        draft.release(1, "s")
        channel.end()
        target.step()
        channel.begin()
    draft.close()


def test_nothing_waits() -> None:
    channel = HostChannel()
    draft = MailboxDraft(channel, SHAPE, gpu(), operations_for(gpu()), logging.getLogger("test"))
    draft.wait_until_ready()
    outcomes = outcomes_of([(0, 0, 5, 7), (3, -1, 0, 0)], 0.8, gpu())
    logits = torch.zeros(SHAPE.slots, 3, 40, device=gpu())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draft.admit(0, "a", PROMPT, SAMPLED)
        draft.logits_into(outcomes, draft.exchange(outcomes), logits)
        draft.release(0, "a")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    draft.close()
