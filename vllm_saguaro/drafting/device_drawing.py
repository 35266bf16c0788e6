"""Which token a branch drafts next, without the host: the likeliest, or one drawn from q by noise that is counted.

Shapes: X rows, V vocabulary, M = min(SUPPORT, V) candidates. Static, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_saguaro.algorithm.noise import gumbel
from vllm_saguaro.algorithm.sampling import SamplingRows, candidates, deflate, race

_DEPTH_BITS, _BRANCH_BITS, _ROUND_BITS, _ADMISSION_BITS = 5, 8, 23, 27


@dataclass(frozen=True, slots=True)
class Rule:
    """How X rows draw.

    `certain` [X] bool: the likeliest token, and a q that is all on it. `noisy` [X] bool: what the noise of `seed` [X]
    int64 picks (`device_coupling.py`), where that is known; nothing is drawn from a q then. c: C of Saguaro sampling.
    """

    rows: SamplingRows
    certain: Tensor
    noisy: Tensor
    seed: Tensor
    c: float = 1.0

    def repeat(self, times: int) -> Rule:
        """The rule of each row for `times` rows in a row."""
        return self._of(x.repeat_interleave(times, output_size=x.shape[0] * times) for x in self._fields())

    def take(self, rows: slice) -> Rule:
        """The rule of some rows."""
        return self._of(x[rows] for x in self._fields())

    def _fields(self) -> tuple[Tensor, ...]:
        rows = self.rows
        return rows.temperature, rows.top_k, rows.top_p, rows.min_p, self.certain, self.noisy, self.seed

    def _of(self, fields: Iterable[Tensor]) -> Rule:
        temperature, top_k, top_p, min_p, certain, noisy, seed = fields
        rows = SamplingRows(temperature, top_k, top_p, min_p, self.rows.nucleus, self.rows.cut)
        return Rule(rows, certain, noisy, seed, self.c)


@dataclass(frozen=True, slots=True)
class Drawn:
    """token [X] int64, drawn from the candidates `tokens` [X, M] int64 with log q [X, M] float32."""

    token: Tensor
    tokens: Tensor
    log_q: Tensor


def seeds(secret: int, admission: Tensor, rounds: Tensor, branches: int, depth: int) -> Tensor:
    """The integers [B * N] int64 that decide the noise of all branches of B requests at one depth.

    No two of a run are equal: each holds the number of the request's admission [B] int64 (which slot it is does not
    matter then), its round [B] int64, the branch and the depth. Nobody who does not know `secret` can tell them.
    """
    branch = torch.arange(branches, device=admission.device)
    number = (admission & (2**_ADMISSION_BITS - 1)) << _ROUND_BITS | (rounds & (2**_ROUND_BITS - 1))
    number = number.unsqueeze(1) << _BRANCH_BITS | branch
    return ((number << _DEPTH_BITS | depth) ^ secret).flatten()


def draw(logits: Tensor, rule: Rule, seed: Tensor, fan_out: int) -> Drawn:
    """The next token of each row, from its logits [X, V] float32, by the noise of `seed` [X] int64.

    A certain row has log q = 0 at its token and -inf elsewhere. The F = `fan_out` likeliest tokens of the others are
    deflated by C before the draw. Logits that are no numbers, or all -inf, have no q: such a row counts as certain, or
    the verifier would draw from what is left of p after a q that is none.
    """
    found = candidates(logits, rule.rows)
    q = found.q
    if rule.c != 1:
        rows = q.shape[0]
        c = torch.full((rows,), rule.c, dtype=torch.float32, device=q.device)
        q = deflate(q, torch.full((rows,), fan_out, dtype=torch.int64, device=q.device), c)
    first = torch.arange(q.shape[-1], device=q.device) == 0
    certain = rule.certain | ~(q.sum(-1) > 0)  # true where the sum is NaN
    q = torch.where(certain.unsqueeze(-1), first.to(q.dtype), q)
    index = race(q, gumbel(seed, found.tokens))
    return Drawn(found.tokens.gather(1, index.unsqueeze(1)).squeeze(1), found.tokens, q.log())
