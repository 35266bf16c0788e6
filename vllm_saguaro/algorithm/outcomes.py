"""Which verification outcomes to draft for: their probabilities under the draft model, and three fan-outs.

While the target verifies the drafts x_1 .. x_n, the draft model guesses the outcome (k, t*): k drafts accepted, then
the bonus token t*. Its logits after each prefix (the glue forward) say how likely each outcome is. SSD paper,
section 4.1.

Shapes: B requests, K draft tokens, N branches, V vocabulary. Of a row's K drafts under verification the first n are
real (0 <= n <= K: a late table leaves fewer than K, a miss none); the rest is padding, and may hold anything.

    logits       [B, K+1, V]  float32  row j: the draft model's logits after the text plus x_1 .. x_j, so that row j < n
                                       predicts x_{j+1} and row n predicts the bonus token of "all accepted"
    drafts       [B, K]       int64    x_1 .. x_n, padding
    n            [B]          int64
    temperature  [B]          float32  of the request; 0 is greedy

Every shape depends on the shapes of the arguments alone and nothing waits for the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast, get_args

import torch
from torch import Tensor

FanOut = Literal["ranked", "geometric", "uniform"]

# The chance that x is accepted, as a power of the draft's own q(x). A greedy target takes its arg-max or nothing and
# agrees with a sure draft more often than q(x) says. A crude map, measured on one small trained pair; even so, ranking
# by it beat every fixed allocation there, greedy and sampling.
GREEDY_ACCEPTANCE_EXPONENT = 0.3
SAMPLING_ACCEPTANCE_EXPONENT = 1.0

# Below this temperature a request is greedy (vLLM draws the line at the same place).
GREEDY_BELOW = 1e-5

# In the place of `bonus` where a row has fewer than N possible outcomes: no token, so no real outcome ever equals it.
NO_TOKEN = -1

# Top-M in two stages: the maxima of groups of this many tokens first, then the tokens of the M best groups. Five times
# faster than one topk on a CPU at V = 128256, and equal at V = 4096.
_GROUP = 32


@dataclass(frozen=True, slots=True)
class Outcomes:
    """N predicted outcomes (k, t*) for each of B requests, no pair twice.

    `accepted` [B, N] int64 is k, `bonus` [B, N] int64 is t*, `probability` [B, N] float32 what the draft believes of
    the pair. `ranked` has the likeliest first; `allocated` goes by k, and within one k has the likeliest first.

    Where there are fewer than N outcomes (a vocabulary that hardly exceeds N, or logits of -inf), the entries left over
    are marked: `bonus` NO_TOKEN, `accepted` 0, `probability` 0.
    """

    accepted: Tensor
    bonus: Tensor
    probability: Tensor


# ---------------------------------------------------------------------------------------------------------------------
# The probability of an outcome
# ---------------------------------------------------------------------------------------------------------------------


def draft_distribution(logits: Tensor, temperature: Tensor) -> Tensor:
    """q [B, K+1, V]: what the draft believes of the next token, as the request samples it.

    softmax(z / T); softmax(z) for greedy rows, where q only predicts what the target's arg-max will be.
    """
    return torch.softmax(logits / _scale(temperature), dim=-1)


def acceptance(q: Tensor, drafts: Tensor, temperature: Tensor) -> Tensor:
    """a [B, K]: the estimated chance that x_j is accepted once x_1 .. x_{j-1} are. Meaningless on padding."""
    x = drafts.clamp(0, q.shape[-1] - 1).unsqueeze(-1)
    return acceptance_from_probability(q[:, :-1].gather(-1, x).squeeze(-1), temperature)


def acceptance_from_probability(q_x: Tensor, temperature: Tensor) -> Tensor:
    """a_j = q_{j-1}(x_j)^gamma, for q_x [B, K]; gamma is 0.3 for greedy rows and 1 otherwise."""
    gamma = torch.where(temperature < GREEDY_BELOW, GREEDY_ACCEPTANCE_EXPONENT, SAMPLING_ACCEPTANCE_EXPONENT)
    return q_x ** gamma.unsqueeze(-1)


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


def outcome_probabilities(logits: Tensor, drafts: Tensor, n: Tensor, temperature: Tensor) -> Tensor:
    """P(k = j, t* = t) [B, K+1, V], the whole space of outcomes; each request's sums to 1.

    P(k = j) q_j(t) / (1 - q_j(x_{j+1})) for j < n, 0 at t = x_{j+1}: a rejected draft is never the bonus token;
    P(k = n) q_n(t) for j = n, with nothing excluded.

    The plain definition. `ranked` and `allocated` compute it for their candidates only.
    """
    q = draft_distribution(logits, temperature)
    length = accepted_length_distribution(acceptance(q, drafts, temperature), n)
    x, rejectable = _rejectable(drafts, n, q.shape[-1])
    rest = q.scatter(-1, x, torch.where(rejectable, 0.0, q.gather(-1, x)))
    # Summed rather than 1 - q(x), which is all rounding where q(x) is near 1; where it is 1, P(k = j) is 0 as well.
    rest = rest / rest.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    length = length.unsqueeze(-1)
    return torch.where(length > 0, length * rest, 0.0)  # also where the padding's logits are NaN


# ---------------------------------------------------------------------------------------------------------------------
# Choosing N outcomes
# ---------------------------------------------------------------------------------------------------------------------


def choose(
    fan_out: str,
    logits: Tensor,
    drafts: Tensor,
    n: Tensor,
    temperature: Tensor,
    branches: int,
    *,
    acceptance: float = 0.7,
    exponent: float = 1.0,
) -> Outcomes:
    """The N = `branches` outcomes to draft for, by the rule `fan_out`.

    `acceptance` and `exponent` are a and r of the geometric rule; the others ignore them.
    """
    if fan_out == "ranked":
        return ranked(logits, drafts, n, temperature, branches)
    if fan_out not in get_args(FanOut):
        raise ValueError(f"fan-out {fan_out!r} is none of {', '.join(get_args(FanOut))}")
    rule = cast(FanOut, fan_out)
    by_length = _fan_out_by_length(rule, drafts.shape[1], branches, acceptance, exponent, logits.device)
    return allocated(logits, drafts, n, temperature, by_length[n], branches)


def ranked(logits: Tensor, drafts: Tensor, n: Tensor, temperature: Tensor, branches: int) -> Outcomes:
    """The N = `branches` likeliest outcomes, over all k at once; the likeliest first.

    Exact: no position can give more than N of the N likeliest, so the top min(N, V) of each position are enough.
    """
    token, log_probability = _candidates(logits, drafts, n, temperature, branches)
    per_position = token.shape[-1]
    count = min(branches, log_probability.flatten(1).shape[1])
    value, index = log_probability.flatten(1).topk(count, dim=1)
    index = torch.nn.functional.pad(index, (0, branches - count))
    value = torch.nn.functional.pad(value, (0, branches - count), value=-torch.inf)
    return _outcomes(index // per_position, token.flatten(1).gather(1, index), value)


def allocated(
    logits: Tensor,
    drafts: Tensor,
    n: Tensor,
    temperature: Tensor,
    fan_out: Tensor | Sequence[int],
    branches: int,
) -> Outcomes:
    """The F_k likeliest bonus tokens at each k, for given fan-outs F (paper, section 4.1).

    `fan_out` is [K+1] for all rows or [B, K+1] with each row's own: integers, F_0 .. F_n summing to N = `branches`.
    What it holds beyond n is ignored. (A sum below N leaves marked entries at the end, one above N loses the last.)
    """
    token, log_probability = _candidates(logits, drafts, n, temperature, branches)
    batch, positions, per_position = token.shape
    device = logits.device

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
    return _outcomes(k, token.flatten(1).gather(1, index), value)


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


def _candidates(logits: Tensor, drafts: Tensor, n: Tensor, temperature: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """The min(N, V) likeliest bonus tokens at each k, and their log P(k, t*).

    Both [B, K+1, min(N, V)], by falling probability; -inf where the outcome is impossible. In logarithms, since at low
    temperatures the tail underflows and its order would be lost. Five passes over [B, K+1, V] and one temporary.
    """
    z = logits / _scale(temperature)
    x, rejectable = _rejectable(drafts, n, z.shape[-1])
    z_x = z.gather(-1, x)
    z.scatter_(-1, x, torch.where(rejectable, -torch.inf, z_x))  # from here on x_{j+1} is out, at j < n

    z_t, token = _top(z, min(branches, z.shape[-1]))

    # All relative to the largest that is left; log_rest = log sum_t exp z_t, without x: the residual's normaliser.
    largest = z_t[..., :1].clamp_min(torch.finfo(z.dtype).min)
    z_t, z_x = z_t - largest, z_x - largest
    log_rest = z.sub_(largest).exp_().sum(-1, keepdim=True).log_()

    # q(x) = e^{z_x} / (e^{z_x} + rest)
    q_x = torch.sigmoid(z_x - log_rest)[:, :-1, 0]
    length = accepted_length_distribution(acceptance_from_probability(q_x, temperature), n).unsqueeze(-1)

    # log P(k) + log q(t) / (1 - q(x))
    possible = (length > 0) & (z_t > -torch.inf)
    return token, torch.where(possible, length.log() + (z_t - log_rest), -torch.inf)


def _top(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest entries of each row of z [B, P, V], falling, and their indices."""
    vocabulary = z.shape[-1]
    stride = vocabulary // _GROUP  # group g is the tokens g, g + stride, g + 2 stride, ...
    if stride < 2 * count:
        value, index = z.topk(count, dim=-1)
        return value, index
    grouped = z[..., : stride * _GROUP].unflatten(-1, (_GROUP, stride))
    group = grouped.amax(dim=-2).topk(count, dim=-1, sorted=False).indices.unsqueeze(-2)
    first = torch.arange(0, stride * _GROUP, stride, device=z.device).unsqueeze(-1)
    token = (first + group).flatten(-2)  # [B, P, _GROUP * count]
    # The tokens that filled no whole group come along as they are.
    tail = torch.arange(stride * _GROUP, vocabulary, device=z.device)
    token = torch.cat((token, tail.expand(*token.shape[:-1], -1)), dim=-1)
    value, index = z.gather(-1, token).topk(count, dim=-1)
    return value, token.gather(-1, index)


def _scale(temperature: Tensor) -> Tensor:
    """[B, 1, 1]: what logits are divided by; 1 for greedy rows."""
    return torch.where(temperature < GREEDY_BELOW, 1.0, temperature).view(-1, 1, 1)


def _rejectable(drafts: Tensor, n: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """x_{j+1} for each j, a valid index also on padding, and where it is real, j < n. Both [B, K+1, 1]."""
    x = torch.nn.functional.pad(drafts, (0, 1)).clamp(0, vocabulary - 1).unsqueeze(-1)
    rejectable = torch.arange(x.shape[1], device=n.device) < n.unsqueeze(-1)
    return x, rejectable.unsqueeze(-1)


def _outcomes(accepted: Tensor, bonus: Tensor, log_probability: Tensor) -> Outcomes:
    possible = log_probability > -torch.inf
    return Outcomes(
        accepted=torch.where(possible, accepted, 0),
        bonus=torch.where(possible, bonus, NO_TOKEN),
        probability=log_probability.exp(),
    )
