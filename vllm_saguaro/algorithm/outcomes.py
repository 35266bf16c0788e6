"""Which verification outcomes to draft for: their probabilities under the draft model, and three fan-outs.

While the target verifies the drafts x_1 .. x_n, the draft model guesses the outcome (k, t*): k drafts accepted, then
the bonus token t*. What it believes of the next token after each prefix (the glue forward) says how likely each outcome
is. SSD paper, section 4.1; the calibrated maps are ours.

Shapes: B requests, K draft tokens, N branches, M candidates a position. Of a row's K drafts under verification the
first n are real (0 <= n <= K: a late table leaves fewer than K, a miss none); the rest is padding, and may hold
anything. Every shape depends on the shapes of the arguments alone and nothing waits for the device, so a CUDA graph can
hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from vllm_saguaro.algorithm.calibration import Event, apply, apply_to_candidates, coverage

FanOut = Literal["ranked", "uncalibrated", "geometric", "uniform"]

# In the place of `bonus` where a row has fewer than N possible outcomes: no token, so no real outcome ever equals it.
NO_TOKEN = -1

# How much of q itself is left in the residual's estimate max(q - q', 0) + .. q. The target's p is not q: what it has
# beyond q falls on any token. Without deflation (q' = q) this is all there is, and its size does not matter.
_DISAGREEMENT = 0.05


@dataclass(frozen=True, slots=True)
class Beliefs:
    """What the draft model believes while x_1 .. x_n are under verification.

    tokens   [B, K+1, M] int64    the candidates after the text plus x_1 .. x_j
    share    [B, K+1, M] float32  how likely each is the target's next token; a row sums to 1. With known noise: of the
                                  choice that this noise makes
    drawn    [B, K+1, M] float32  q', what x_{j+1} was drawn from; `share` itself unless Saguaro sampling deflated it
    drafts   [B, K] int64         x_1 .. x_n, padding
    n        [B] int64
    classes  [B] int64            of `calibration.class_of`
    """

    tokens: Tensor
    share: Tensor
    drawn: Tensor
    drafts: Tensor
    n: Tensor
    classes: Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """Raw scores in [0, 1] of the events that make an outcome; `calibration` turns them into probabilities.

    accept  [B, K] float32       x_{j+1} is accepted
    token   [B, K+1, M] float32  each candidate is the bonus token, given that the drafts before it were accepted and
                                 the one in its place was not; 0 where it cannot be
    """

    accept: Tensor
    token: Tensor


@dataclass(frozen=True, slots=True)
class Outcomes:
    """N predicted outcomes (k, t*) for each of B requests, no pair twice.

    `accepted` [B, N] int64 is k, `bonus` [B, N] int64 is t*, `probability` [B, N] float32 what is believed of the
    pair. `ranked` has the likeliest first; `allocated` goes by k, and within one k has the likeliest first.

    Where there are fewer than N outcomes the entries left over are marked: `bonus` NO_TOKEN, `accepted` 0,
    `probability` 0.
    """

    accepted: Tensor
    bonus: Tensor
    probability: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# The probability of an outcome
# ---------------------------------------------------------------------------------------------------------------------


def scores(beliefs: Beliefs) -> Scores:
    """The raw scores of all events.

    accept_j = share_j(x_{j+1});  token_j ~ max(q_j - q'_j, 0) + eps q_j without x_{j+1} for j < n (a rejected draft is
    never the bonus token), share_n for j = n.
    """
    share, n = beliefs.share, beliefs.n
    is_draft = beliefs.tokens[:, :-1] == beliefs.drafts.unsqueeze(-1)
    accept = torch.where(is_draft, share[:, :-1], 0.0).sum(-1)
    residual = (share - beliefs.drawn).clamp_min(0.0) + _DISAGREEMENT * share
    residual[:, :-1].masked_fill_(is_draft, 0.0)
    residual = residual / residual.sum(-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)
    rejected = (torch.arange(share.shape[1], device=n.device) < n.unsqueeze(-1)).unsqueeze(-1)
    return Scores(accept, torch.where(rejected, residual, share))


def accepted_length_distribution(a: Tensor, n: Tensor) -> Tensor:
    """P(k) [B, K+1] from the acceptances a [B, K].

    P(k = j) = a_1 .. a_j (1 - a_{j+1}) for j < n;  P(k = n) = a_1 .. a_n;  0 beyond.
    """
    real = torch.arange(a.shape[1], device=a.device) < n.unsqueeze(-1)
    a = torch.where(real, a, 0.0)  # a_{n+1} = 0: nothing is accepted beyond n, and P(k = n) needs no case of its own
    edge = torch.ones_like(n, dtype=a.dtype).unsqueeze(-1)
    reached = torch.cat((edge, a), dim=1).cumprod(dim=1)  # a_1 .. a_j
    stopped = torch.cat((1 - a, edge), dim=1)  # 1 - a_{j+1}
    return reached * stopped


def outcome_log_probabilities(beliefs: Beliefs, raw: Scores, table: Tensor) -> Tensor:
    """log P(k = j, t* = t) [B, K+1, M] of every candidate; -inf where it cannot be.

    P(k = j) P(t* = t | k = j): the first from raw scores through their calibrated map (`table` of `Calibration.table`),
    the second likewise, in proportion: the candidates of a position add up to the chance that t* is one of them.
    """
    classes, n = beliefs.classes, beliefs.n
    length = accepted_length_distribution(apply(table, classes, Event.ACCEPTANCE, raw.accept), n)
    rejected = torch.arange(length.shape[1], device=n.device) < n.unsqueeze(-1)
    possible = raw.token > 0
    token = torch.where(possible, apply_to_candidates(table, classes, rejected, raw.token), 0.0)
    of_all = token.sum(-1, keepdim=True).clamp_min(torch.finfo(token.dtype).tiny)
    length = (length * coverage(table, classes, rejected)).unsqueeze(-1)
    return torch.where(possible & (length > 0), length.log() + (token / of_all).log(), -torch.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing N outcomes
# ---------------------------------------------------------------------------------------------------------------------


def choose(
    fan_out: str,
    beliefs: Beliefs,
    raw: Scores,
    table: Tensor,
    branches: int,
    *,
    acceptance: float = 0.7,
    exponent: float = 1.0,
) -> Outcomes:
    """The N = `branches` outcomes to draft for, by the rule `fan_out`.

    `table` holds the calibrated maps ("uncalibrated" is "ranked" with those that have learnt nothing: the caller's
    choice of table). `acceptance` and `exponent` are a and r of the geometric rule; the others ignore them. Raises
    ValueError for an unknown rule.
    """
    log_probability = outcome_log_probabilities(beliefs, raw, table)
    if fan_out in ("ranked", "uncalibrated"):
        return ranked(beliefs.tokens, log_probability, branches)
    if fan_out not in get_args(FanOut):
        raise ValueError(f"fan-out {fan_out!r} is none of {', '.join(get_args(FanOut))}")
    rule = cast(FanOut, fan_out)
    num_drafts = beliefs.drafts.shape[1]
    by_length = _fan_out_by_length(rule, num_drafts, branches, acceptance, exponent, beliefs.n.device)
    return allocated(beliefs.tokens, log_probability, beliefs.n, by_length[beliefs.n], branches)


def ranked(tokens: Tensor, log_probability: Tensor, branches: int) -> Outcomes:
    """The N = `branches` likeliest of the outcomes [B, K+1, M], over all k at once; the likeliest first."""
    flat = log_probability.flatten(1)
    count = min(branches, flat.shape[1])
    value, index = flat.topk(count, dim=1)
    index = torch.nn.functional.pad(index, (0, branches - count))
    value = torch.nn.functional.pad(value, (0, branches - count), value=-torch.inf)
    return _outcomes(index // tokens.shape[-1], tokens.flatten(1).gather(1, index), value)


def allocated(
    tokens: Tensor, log_probability: Tensor, n: Tensor, fan_out: Tensor | Sequence[int], branches: int
) -> Outcomes:
    """The F_k likeliest bonus tokens at each k, for given fan-outs F (paper, section 4.1).

    `fan_out` is [K+1] for all rows or [B, K+1] with each row's own: integers, F_0 .. F_n summing to N = `branches`.
    What it holds beyond n is ignored. (A sum below N leaves marked entries at the end, one above N loses the last.)
    """
    log_probability, order = log_probability.sort(dim=-1, descending=True, stable=True)
    tokens = tokens.gather(-1, order)
    batch, positions, per_position = tokens.shape
    device = tokens.device

    f = torch.as_tensor(fan_out, device=device).expand(batch, positions)
    f = torch.where(torch.arange(positions, device=device) <= n.unsqueeze(-1), f, 0)
    end = f.cumsum(dim=1)  # branches end_{k-1} .. end_k - 1 belong to k
    branch = torch.arange(branches, device=device).expand(batch, branches)
    k = torch.searchsorted(end, branch.contiguous(), right=True)
    given = k < positions
    k = k.clamp_max(positions - 1)
    rank = branch - (end - f).gather(1, k)
    given &= rank < per_position

    index = k * per_position + rank.clamp_max(per_position - 1)
    value = torch.where(given, log_probability.flatten(1).gather(1, index), -torch.inf)
    return _outcomes(k, tokens.flatten(1).gather(1, index), value)


# ---------------------------------------------------------------------------------------------------------------------
# Fixed allocations of the fan-out
# ---------------------------------------------------------------------------------------------------------------------


def uniform_fan_out(n: int, branches: int) -> list[int]:
    """F_0 .. F_n, equal but for the remainder, which goes to k = n first (the likeliest), then to k = 0, 1, ..."""
    share, remainder = divmod(branches, n + 1)
    fan_out = [share] * (n + 1)
    for k in [n, *range(n)][:remainder]:
        fan_out[k] += 1
    return fan_out


def geometric_fan_out(n: int, branches: int, acceptance: float = 0.7, exponent: float = 1.0) -> list[int]:
    """F_0 .. F_n of the paper's Theorem 12, for one acceptance a of every draft and the hit rate's exponent r.

    F_k ~ a^{k/(1+r)} for k < n;  F_n ~ a^{n/(1+r)} (1 - a)^{-1/(1+r)}. That is `fan_out_from_lengths` for
    P(k) = a^k (1 - a), P(n) = a^n.
    """
    lengths = [acceptance**k * (1 - acceptance) for k in range(n)] + [acceptance**n]
    return fan_out_from_lengths(lengths, branches, exponent)


def fan_out_from_lengths(lengths: Sequence[float], branches: int, exponent: float) -> list[int]:
    """F_0 .. F_n for any distribution P(k) of the accepted length, such as a measured histogram; sums to `branches`.

    With the paper's power law (Definition 11), a fan-out of F misses with chance F^-r. The best real-valued F is
    F_k ~ P(k)^{1/(1+r)}; the best integers come from giving each branch where it saves most, since the saving
    P(k) (F^-r - (F+1)^-r) only falls as F grows. The law says nothing of F = 0: every k with P(k) > 0 gets one branch
    first, the likeliest k when there are not enough.
    """
    if exponent <= 0:
        raise ValueError(f"the exponent of the hit rate must be positive, not {exponent}")
    possible = [k for k, p in enumerate(lengths) if p > 0]
    if not possible:
        raise ValueError("no accepted length has a positive probability")
    fan_out = [0] * len(lengths)
    likeliest_first = sorted(possible, key=lambda k: -lengths[k])
    for k in likeliest_first[:branches]:
        fan_out[k] = 1
    for _ in range(branches - len(possible)):
        k = max(possible, key=lambda k: lengths[k] * (fan_out[k] ** -exponent - (fan_out[k] + 1) ** -exponent))
        fan_out[k] += 1
    return fan_out


# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _fan_out_by_length(
    rule: FanOut, num_drafts: int, branches: int, acceptance: float, exponent: float, device: torch.device
) -> Tensor:
    """[K+1, K+1] int64: row n is the fan-out for n drafts under verification, 0 beyond n."""
    rows = []
    for n in range(num_drafts + 1):
        if rule == "uniform":
            row = uniform_fan_out(n, branches)
        else:
            row = geometric_fan_out(n, branches, acceptance, exponent)
        rows.append(row + [0] * (num_drafts - n))
    return torch.tensor(rows, device=device)


def _outcomes(accepted: Tensor, bonus: Tensor, log_probability: Tensor) -> Outcomes:
    possible = log_probability > -torch.inf
    return Outcomes(
        accepted=torch.where(possible, accepted, 0),
        bonus=torch.where(possible, bonus, NO_TOKEN),
        probability=log_probability.exp(),
    )
