"""A target and a draft small enough to know every probability: the next token's logits depend on the last two tokens.

The target's conditionals are computed here once more, in numpy and float64, from what the sampling parameters are
documented to do: nothing of vLLM's or of ours takes part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_saguaro.messages import Noise, Sampling

Floats = npt.NDArray[np.float64]

VOCABULARY = 6
PROMPT = (1, 3, 0)
EMITTED = 4
"""Tokens of a continuation that are looked at together: V^4 = 1296 texts."""


@dataclass(frozen=True)
class Setting:
    """The sampling parameters of all requests of a cell, by vLLM's names."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def sampling(self, noise: Noise) -> Sampling:
        """As the draft side is told it: without the penalties, which it does not know."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, noise, prompt_length=len(PROMPT))


SETTINGS: dict[str, Setting] = {
    "T=1": Setting(),
    "T=0.3": Setting(temperature=0.3),
    "T=0.7": Setting(temperature=0.7),
    "T=1.5": Setting(temperature=1.5),
    "top-k": Setting(top_k=3),
    "top-p": Setting(top_p=0.8),
    "min-p": Setting(min_p=0.15),
    "presence": Setting(presence_penalty=0.9),
    "frequency": Setting(temperature=0.8, frequency_penalty=0.7),
    "repetition": Setting(repetition_penalty=1.6),
    "all": Setting(0.9, 5, 0.95, 0.02, 0.4, 0.3, 1.2),
}

Settings = tuple[Setting, ...]
"""Of the requests of a batch, in turn: request i has number i modulo their count."""

NEIGHBOURS: Settings = (
    Setting(temperature=0.7, top_k=3),
    Setting(temperature=0.0, repetition_penalty=1.3),
    Setting(temperature=1.5, min_p=0.1, presence_penalty=0.5),
    Setting(temperature=1.0, top_p=0.8),
)
"""Requests that differ in everything, in one batch."""


@cache
def target_logits() -> Tensor:
    """[V, V, V] float32: by the last token but one, the last token, the next one."""
    return torch.from_numpy(np.random.default_rng(20).normal(0, 1.2, (VOCABULARY,) * 3)).float()


@cache
def draft_logits() -> Tensor:
    """The same for the draft: like the target's, but not equal anywhere."""
    off = np.random.default_rng(21).normal(0, 0.8, (VOCABULARY,) * 3)
    return (0.9 * target_logits() + torch.from_numpy(off)).float()


@cache
def conditionals(setting: Setting) -> tuple[Floats, ...]:
    """p [V^i, V] of output token i = 0 .. EMITTED - 1 after every text of i tokens; texts are numbers with base V."""
    found = []
    for length in range(EMITTED):
        texts = product(range(VOCABULARY), repeat=length)
        found.append(np.stack([next_token(setting, text) for text in texts]))
    return tuple(found)


@cache
def joint(setting: Setting) -> Floats:
    """P [V^EMITTED] of every continuation: the product of its conditionals."""
    p = np.ones(1)
    for conditional in conditionals(setting):
        p = (p[:, None] * conditional).ravel()
    return p


def next_token(setting: Setting, outputs: tuple[int, ...]) -> Floats:
    """p [V] of the target's token after the prompt and `outputs`, as vLLM documents its sampling parameters."""
    text = PROMPT + outputs
    z = target_logits()[text[-2], text[-1]].double().numpy().copy()
    for token in set(text):
        z[token] = z[token] / setting.repetition_penalty if z[token] > 0 else z[token] * setting.repetition_penalty
    for token in set(outputs):
        z[token] -= setting.frequency_penalty * outputs.count(token) + setting.presence_penalty
    if setting.temperature == 0:
        return np.eye(VOCABULARY)[z.argmax()]
    p = _normalised(np.exp(z / setting.temperature))
    p = _normalised(np.where(p < setting.min_p * p.max(), 0.0, p))
    if setting.top_k:
        p = _normalised(np.where(p < np.sort(p)[-setting.top_k], 0.0, p))
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= setting.top_p]] = 0.0  # the mass before a token is enough already
    return _normalised(p)


def _normalised(p: Floats) -> Floats:
    return p / p.sum()


def contexts(text: Tensor, length: Tensor, drafts: Tensor) -> Tensor:
    """The last two tokens [R, K + 1, 2] of each text followed by its first j = 0 .. K drafts [R, K].

    `text` [R, L] int64 holds `length` [R] tokens and has room for the drafts.
    """
    steps = torch.arange(drafts.shape[1] + 1)
    whole = text.scatter(1, length.unsqueeze(1) + steps[:-1], drafts)
    end = length.unsqueeze(1) + steps
    return torch.stack((whole.gather(1, end - 2), whole.gather(1, end - 1)), dim=-1)
