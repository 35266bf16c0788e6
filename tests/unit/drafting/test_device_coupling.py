"""The device engine where the target's noise is known: drafts are what it picks, outcomes are predicted by it."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from tests.unit.drafting.device_driver import World, picked
from tests.unit.drafting.fake_device_model import FakeDeviceModel
from vllm_saguaro.algorithm.position_noise import add_noise, stems
from vllm_saguaro.algorithm.sampling import SamplingRows
from vllm_saguaro.drafting import device_round
from vllm_saguaro.drafting.device_coupling import believed, pick
from vllm_saguaro.drafting.device_drawing import Rule
from vllm_saguaro.kernels.operations import TWINS
from vllm_saguaro.messages import Noise, Sampling

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
COUPLED = Sampling(temperature=1.0, noise=Noise.POSITION, seed=-123456789012)


def world(**options: object) -> World:
    return World(FakeDeviceModel(max_length=128), method="coupled", branches=6, **options)  # type: ignore[arg-type]


def says(sampling: Sampling, text: list[int], other: FakeDeviceModel) -> int:
    """The target's next token; it is another model than the draft, but like it."""
    own = FakeDeviceModel(max_length=128).language.logits_after(text)
    logits = own + 0.3 * other.language.logits_after(text)
    return int(logits.argmax()) if sampling.greedy else picked(logits, len(text), sampling)


def play(w: World, steps: int, slots: tuple[int, ...] = (0,)) -> None:
    """Outcomes as a target finds them that decides each token before it looks at drafts."""
    other = FakeDeviceModel(max_length=128, seed=5)
    for _ in range(steps):
        found = {}
        for slot in slots:
            request, accepted = w.requests[slot], 0
            text = list(request.text)
            token = says(request.sampling, text, other)
            while accepted < len(request.drafts) and request.drafts[accepted] == token:
                text.append(token)
                accepted += 1
                token = says(request.sampling, text, other)
            found[slot] = accepted, token
        w.step(found)


def test_drafts_are_what_the_noise_picks_and_outcomes_are_found() -> None:
    w = world()
    w.admit(0, PROMPT, COUPLED)
    w.admit(1, PROMPT[:5], replace(COUPLED, seed=7, temperature=0.6))
    play(w, 20, (0, 1))
    assert w.tables_seen > 20
    assert w.hits > 20


def test_top_k_greedy_rows_and_seeds_beside_each_other() -> None:
    w = world()
    w.admit(0, PROMPT, replace(COUPLED, top_k=3))
    w.admit(1, PROMPT, Sampling())
    w.admit(2, PROMPT, replace(COUPLED, seed=2**63 - 1, temperature=1.3))
    play(w, 12, (0, 1, 2))
    assert w.hits > 12


@pytest.mark.parametrize("shift", [-1, 1])
def test_noise_of_another_position_is_seen(shift: int) -> None:
    w = world()
    w.admit(0, PROMPT, COUPLED)
    with (
        mock.patch.object(device_round, "stems", lambda seeds, at: stems(seeds, at + shift)),
        pytest.raises(AssertionError, match="not what the noise picks"),
    ):
        play(w, 4)


def test_a_slot_used_again_has_the_noise_of_its_new_request() -> None:
    w = world()
    w.admit(0, PROMPT, COUPLED)
    play(w, 3)
    w.release(0)
    w.admit(0, PROMPT, replace(COUPLED, seed=99))
    play(w, 6)
    w.release(0)
    w.admit(0, PROMPT, Sampling())
    play(w, 3)


def test_no_q_is_kept() -> None:
    w = world()
    assert w.engine.state.q_tokens.shape[-1] == 1
    assert w.engine.sampling_c is None


def rule(samplings: list[Sampling]) -> Rule:
    device = "cpu"
    rows = SamplingRows.of(samplings, device)
    rows = SamplingRows(rows.temperature, rows.top_k, rows.top_p, rows.min_p, nucleus=False, cut=True)
    noisy = torch.tensor([s.coupled for s in samplings])
    return Rule(rows, ~noisy, noisy, torch.tensor([s.seed for s in samplings]))


def test_what_is_picked_is_drawn_from_q() -> None:
    """Over many seeds, with a top-k: each of the tokens that are left about as often as q says."""
    count, logits = 4000, torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0])
    samplings = [Sampling(temperature=0.8, top_k=3, noise=Noise.POSITION, seed=seed) for seed in range(count)]
    each = rule(samplings)
    stem = stems(each.seed, torch.full((count,), 5))
    tokens = pick(logits.repeat(count, 1), each, stem, add_noise)
    q = (logits[:3] / 0.8).softmax(0)
    found = torch.bincount(tokens, minlength=5) / count
    assert found[3:].sum() == 0
    assert torch.allclose(found[:3], q, atol=0.03)


def test_beliefs_lie_on_what_the_noise_puts_first() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 200)
    each = rule([COUPLED, Sampling()])
    stem = stems(each.seed, torch.tensor([30, 30]))
    tokens, share = believed(logits.clone(), each, stem, TWINS.add_noise)
    assert tokens[0, 0] == picked(logits[0], 30, COUPLED)
    assert tokens[1].tolist() == logits[1].topk(64).indices.tolist()
    torch.testing.assert_close(share.sum(-1), torch.ones(2))
    torch.testing.assert_close(share[1], logits[1].topk(64).values.softmax(0))
