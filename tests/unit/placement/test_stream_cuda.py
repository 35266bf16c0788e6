"""The stream placement with a model in PyTorch: on a GPU with stream, graphs and kernels, on a CPU with their twins.

Tables, drafts and KV are looked at after each step, against the oracle of `World`.
"""

from __future__ import annotations

import pytest
import torch

from tests.unit.drafting.device_driver import World
from tests.unit.drafting.torch_device_model import TorchDeviceModel
from vllm_saguaro.kernels.operations import operations_for
from vllm_saguaro.messages import Noise, Sampling
from vllm_saguaro.placement.side_stream import side_stream

NEEDS_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
DEVICES = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=NEEDS_A_GPU)])
PROMPT = [(7 * i + 3) % 40 for i in range(11)]
NOISY = Sampling(temperature=0.8, noise=Noise.POSITION, seed=5)


def world_on(where: str) -> World:
    device = torch.device(where, 0) if where == "cuda" else torch.device(where)
    stream = side_stream(device)
    return World(TorchDeviceModel(device), operations=operations_for(device), stream=stream, method="coupled")


def story(world: World, steps: int = 24) -> None:
    """Hits and misses of a greedy request and of one with noise; a third comes, goes, and its slot is used again."""
    world.admit(0, PROMPT)
    world.admit(2, PROMPT[:5], NOISY)
    for number in range(steps):
        if number % 6 == 2:
            world.admit(1, [number, *PROMPT[: number % 5 + 1]])
        if number % 6 == 5:
            world.release(1)
        for slot in (0, 2):
            if len(world.requests[slot].text) > 48:
                world.release(slot)
                world.admit(slot, PROMPT[: slot + 3], NOISY if slot else None)
        found = {}
        for slot in world.requests:
            table = world.table(slot)
            found[slot] = table[number % len(table)][0] if table and number % 4 else (0, (number + slot) % 40)
        world.step(found)


@DEVICES
@pytest.mark.parametrize("captured", [False, True])
def test_every_branch_is_what_the_draft_model_says(where: str, captured: bool) -> None:
    world = world_on(where)
    if captured:
        world.draft.capture()
    story(world)
    assert world.hits > 20
    assert world.tables_seen > 40
    assert any(name == ("work", bucket) for bucket in world.engine.buckets for name in world.draft._calls._graphs) == (
        captured and where == "cuda"
    )
    world.draft.close()


def test_a_branch_that_reads_another_text_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model in PyTorch looks into nothing, so what it says must tell."""
    write = TorchDeviceModel._write
    monkeypatch.setattr(TorchDeviceModel, "_write", lambda self, places, ids: write(self, places, ids.roll(1)))
    with pytest.raises(AssertionError):
        story(world_on("cpu"))


@NEEDS_A_GPU
@pytest.mark.parametrize("captured", [False, True])
def test_nothing_waits(captured: bool) -> None:
    world = world_on("cuda")
    if captured:
        world.draft.capture()
    story(world)  # what a library makes once, it has made
    for slot in list(world.requests):
        world.release(slot)
    requests = {slot: world.admit(slot, PROMPT[: slot + 4], NOISY if slot else None) for slot in (0, 2)}
    steps = [world.outcomes({0: (0, 5), 2: (0, 6)}) for _ in range(3)]
    logits = torch.zeros(4, world.drafts, 40, device=world.model.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for outcomes in steps:
            drafts = world.draft.exchange(outcomes)
            world.draft.logits_into(outcomes, drafts, logits)
        world.draft.release(0, requests[0].name)
        world.draft.admit(0, "another", PROMPT, Sampling())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert world.draft.alive
    assert not logits.isnan().any()
    world.draft.close()
