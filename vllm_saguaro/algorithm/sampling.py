"""What a drafted token is drawn from, and how. SSD paper, section 4.2.

The draft side draws from q over the M likeliest tokens of its own logits, cut by the request's own top-k, top-p and
min-p as the target cuts p: a token that the target can never give is never drafted. Whatever q is, the verifier is
exact as long as it is told the q that was drawn from; so q may be truncated here, and deflated (`deflate`).

Shapes: R rows (a request, or one of its branches), V vocabulary, M = min(SUPPORT, V) candidates.

All functions but `SamplingRows.of` are static: every shape depends on the shapes of the arguments alone, and nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_saguaro.messages import Sampling

# How many tokens a draft is drawn from at most: few enough to send along with a table, and what a drafter gives the
# tokens beyond them hardly matters.
SUPPORT = 64

# Top-M in two stages: the maxima of groups of this many tokens first, then the tokens of the M best groups. Faster than
# one topk on a CPU at a large vocabulary (3 times at R = 64, M = 64, V = 128256).
_GROUP = 32


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The sampling of R rows, as tensors [R]: `temperature`, `top_p`, `min_p` float32, `top_k` int64.

    `temperature` is positive: a greedy row has 1, and its cuts are off, since its q only predicts. `nucleus` says that
    some row may need the mass of the whole vocabulary for its top-p, `cut` that some row has a cut at all; where they
    are False passes over the logits and the candidates are saved.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    nucleus: bool = True
    cut: bool = True

    @classmethod
    def of(cls, samplings: Sequence[Sampling], device: torch.device | str) -> SamplingRows:
        """One row each, on `device`."""
        as_drawn = [Sampling(temperature=1.0) if sampling.greedy else sampling for sampling in samplings]
        return cls(
            temperature=torch.tensor([s.temperature for s in as_drawn], dtype=torch.float32, device=device),
            top_k=torch.tensor([s.top_k for s in as_drawn], dtype=torch.int64, device=device),
            top_p=torch.tensor([s.top_p for s in as_drawn], dtype=torch.float32, device=device),
            min_p=torch.tensor([s.min_p for s in as_drawn], dtype=torch.float32, device=device),
            nucleus=any(s.top_p < 1 and not 0 < s.top_k <= SUPPORT for s in as_drawn),
            cut=any(s.cut for s in as_drawn),
        )

    def take(self, index: Tensor) -> SamplingRows:
        """The rows `index` (int64, any length, repeats allowed), such as one for each branch of a request."""
        return SamplingRows(
            *(self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index]),
            *(self.nucleus, self.cut),
        )


@dataclass(frozen=True, slots=True)
class Candidates:
    """What a draft may be: `tokens` [R, M] int64, and `q` [R, M] float32, the probability of each.

    Each row goes by falling q and sums to 1; a token that the request's own cuts exclude has q = 0. (A row without one
    finite logit has q = 0 everywhere.)
    """

    tokens: Tensor
    q: Tensor


def candidates(logits: Tensor, rows: SamplingRows) -> Candidates:
    """The M likeliest tokens of logits [R, V] float32 (which may hold -inf, and stay as they are), and their q.

    q = softmax(z / T) over the M, without what min-p, top-k and top-p exclude: in this order, as in vLLM
    (`Sampler.sample`; `apply_top_k_top_p_pytorch` in vllm/v1/sample/ops/topk_topp_sampler.py). Tokens as likely as the
    k-th stay. The mass that top-p counts is relative to all tokens that min-p and top-k leave, also those beyond the M;
    only for a top-k above M it is relative to all that min-p leaves, so that a few too many may stay.
    """
    values, tokens = top(logits, min(SUPPORT, logits.shape[-1]))
    if not rows.cut:
        z = values / rows.temperature.unsqueeze(-1)
        mass = (z - z[:, :1].clamp_min(torch.finfo(z.dtype).min)).exp()
        return Candidates(tokens, mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny))
    temperature, min_p, top_p = (x.unsqueeze(-1) for x in (rows.temperature, rows.min_p, rows.top_p))
    z = values / temperature
    count = z.shape[-1]
    largest = z[:, :1].clamp_min(torch.finfo(z.dtype).min)

    # min-p: q_t < min_p max q, where exp(z_t - max z) = q_t / max q
    z = z.masked_fill((z - largest).exp() < min_p, -torch.inf)

    # Compared as logits: two that differ may have the same exponential.
    top_k = rows.top_k.unsqueeze(-1)
    limited = (top_k > 0) & (top_k <= count)
    kth = z.gather(-1, top_k.clamp(1, count) - 1)
    z = z.masked_fill(limited & (z < kth), -torch.inf)

    # top-p: out where the tokens before have reached p of the mass. The first has none before it.
    mass = (z - largest).exp()
    total = mass.sum(-1, keepdim=True)
    if rows.nucleus and logits.shape[-1] > count:
        total = torch.where(limited, total, _mass(logits, temperature, largest, min_p))
    before = torch.nn.functional.pad(mass.cumsum(-1)[:, :-1], (1, 0))
    first = torch.arange(count, device=z.device) == 0
    mass = mass.masked_fill((top_p < 1) & (before >= top_p * total) & ~first, 0.0)

    return Candidates(tokens, mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny))


def top(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row of z [..., V], falling, and their indices (int64): both [..., count].

    RuntimeError where `count` exceeds V. Exact: `count` entries lie in at most as many groups, and no group that is
    passed over has a larger one.
    """
    vocabulary = z.shape[-1]
    stride = vocabulary // _GROUP  # group g is the tokens g, g + stride, g + 2 stride, ...
    if stride < 16 * count:
        value, index = z.topk(count, dim=-1)
        return value, index
    grouped = z[..., : stride * _GROUP].unflatten(-1, (_GROUP, stride))
    group = grouped.amax(dim=-2).topk(count, dim=-1, sorted=False).indices.unsqueeze(-2)
    first = torch.arange(0, stride * _GROUP, stride, device=z.device).unsqueeze(-1)
    token = (first + group).flatten(-2)  # [..., _GROUP * count]
    # The tokens that filled no whole group come along as they are.
    tail = torch.arange(stride * _GROUP, vocabulary, device=z.device)
    token = torch.cat((token, tail.expand(*token.shape[:-1], -1)), dim=-1)
    value, index = z.gather(-1, token).topk(count, dim=-1)
    return value, token.gather(-1, index)


def deflate(q: Tensor, fan_out: Tensor, c: Tensor) -> Tensor:
    """q' [R, M]: Saguaro sampling, sigma_{F,C} (paper, Definition 14), for q [R, M] by falling probability.

    q'_t ~ C q_t for the first F = fan_out[r] (int64) entries, ~ q_t for the others; C = c[r] float32, in [0, 1]. What
    is taken from the tokens whose outcomes are drafted for stays in the residual max(p - q', 0), so that the bonus
    token of a rejection is more often one of them. The verifier must be told q'.

    C = 1 changes nothing, nor does any C where the first F have all the mass (also C = 0, where the rule itself would
    leave nothing).
    """
    deflated = torch.arange(q.shape[-1], device=q.device) < fan_out.unsqueeze(-1)
    c = c.unsqueeze(-1)
    weight = torch.where(deflated, c * q, q)
    others = q.masked_fill(deflated, 0.0).sum(-1, keepdim=True)
    same = (c == 1) | (others == 0)
    return torch.where(same, q, weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny))


def draw(q: Tensor, generator: torch.Generator) -> Tensor:
    """Index [R] int64 of one entry per row, drawn from q [R, M] with the generator (of the same device).

    An exponential race: argmax_t q_t / e_t with e_t ~ Exp(1) falls on t with probability q_t. Never an entry with
    q = 0, even if its e_t is 0 as well (unless the whole row is 0: then 0).
    """
    e = torch.empty_like(q).exponential_(generator=generator)
    return torch.where(q > 0, q / e, -1.0).argmax(-1)


def race(q: Tensor, noise: Tensor) -> Tensor:
    """Index [R] int64 of one entry per row: argmax_t log q_t + g_t, for q and the noise g of its tokens, both [R, M].

    With the target's own Gumbel noise (`noise.gumbel`) this is what the target takes, if q is p; the draw is from q all
    the same. Never an entry with q = 0 (unless the whole row is 0: then 0).
    """
    return torch.where(q > 0, q.to(noise.dtype).log() + noise, -torch.inf).argmax(-1)


def within_cuts(picked: Tensor, found: Candidates, noise: Tensor) -> Tensor:
    """Of tokens [R] int64 that noise has picked from all, those that a request's own cuts leave it.

    `noise` [R, M]: of the candidates `found`. Where a cut falls among them, nothing beyond them is left either.
    """
    index = race(found.q, noise).unsqueeze(1)
    return torch.where((found.q == 0).any(-1), found.tokens.gather(1, index).squeeze(1), picked)


def _mass(logits: Tensor, temperature: Tensor, largest: Tensor, min_p: Tensor) -> Tensor:
    """[R, 1]: the sum of exp(logits / T - largest) over what min-p leaves of the whole vocabulary."""
    mass = (logits / temperature).sub_(largest).exp_()
    return mass.mul_(mass >= min_p).sum(-1, keepdim=True)
