"""Which token a branch drafts next where the noise of the target is known: the one that the noise picks.

The target takes argmax_t (z_t / T + g_t) with the noise of its position (`algorithm/position_noise.py`); the draft does
the same over its own logits. A row that is not noisy is greedy: its logits stay as they are.

Shapes: X rows, V vocabulary, M = min(SUPPORT, V) candidates. Static, and nothing waits for the device. The logits that
are given are overwritten.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_saguaro.algorithm.position_noise import gumbel
from vllm_saguaro.algorithm.sampling import SUPPORT, candidates, top, within_cuts
from vllm_saguaro.drafting.device_drawing import Rule
from vllm_saguaro.drafting.forecast import NOISE_SHARPNESS

AddNoise = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""`Operations.add_noise`."""


def pick(logits: Tensor, rule: Rule, stem: Tensor, add_noise: AddNoise) -> Tensor:
    """The token [X] int64 that each row's noise picks from its logits [X, V] float32, by the stems [X] int64.

    argmax_t z_t / T + g_t over all tokens, or over those that a request's own cuts leave.
    """
    found = candidates(logits, rule.rows)
    add_noise(logits, rule.rows.temperature, stem, rule.noisy)
    picked = within_cuts(logits.argmax(-1), found, gumbel(stem, found.tokens))
    return torch.where(rule.noisy, picked, found.tokens[:, 0])


def believed(logits: Tensor, rule: Rule, stem: Tensor, add_noise: AddNoise) -> tuple[Tensor, Tensor]:
    """The M likeliest choices of the target's [X, M] int64 after each row, and how likely each is [X, M] float32.

    With noise (q e^g)^gamma over the M tokens that q e^g puts first, as `Forecaster` has it; without, q over the M
    likeliest. A cut of the target's falls elsewhere than the draft's would, so it is predicted without.
    """
    add_noise(logits, rule.rows.temperature, stem, rule.noisy)
    value, tokens = top(logits, min(SUPPORT, logits.shape[-1]))
    sharpness = torch.where(rule.noisy, NOISE_SHARPNESS, 1.0)
    return tokens, torch.softmax(sharpness.unsqueeze(-1) * value, dim=-1)
