"""The N likeliest outcomes (k, t*) of a verification, from logarithms and in one operation.

`outcomes.py` has the same rule with calibrated maps and other fan-outs; this is what the device's round does, where a
kernel can take its place. Shapes: B rows, K drafts under verification, M candidates a position, N branches. Every shape
depends on the shapes of the arguments alone and nothing waits for the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

IMPOSSIBLE = -1
"""In the place of k where a row has fewer than N possible outcomes."""


def ranked_outcomes(
    candidates: Tensor,
    log_q: Tensor,
    drafts: Tensor,
    under_verification: Tensor,
    accept: Tensor,
    branches: int,
    room: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(accepted [B, N] int32, bonus [B, N] int64, log_p [B, N] float32): the likeliest outcomes, the likeliest first.

    candidates          [B, K+1, M] int64    the likely tokens after x_1 .. x_j, none twice at one position
    log_q               [B, K+1, M] float32  their log probabilities, -inf: impossible; need not sum to 1
    drafts              [B, K] int64         x_1 .. x_n, then anything
    under_verification  [B] int32            n, 0 .. K
    accept              [B, K] float32       a_j: x_{j+1} is accepted once those before it are, in [0, 1]; then anything
    room                [B] int32            outcomes with k >= room are impossible

    log P(k, t) = sum_{j<k} log a_j + log(1 - a_k) + log q_k(t), without log(1 - a_k) at k = n. At k < n the draft
    x_{k+1} is no bonus token. q_k is scaled to sum to 1 over the candidates that are left. Equal ones are ordered by k,
    then by the candidate's index. An impossible outcome has `accepted` IMPOSSIBLE, `bonus` 0 (a token, but nobody's)
    and `log_p` -inf; so has one whose probability is not a number.
    """
    batch, positions, per_position = candidates.shape
    n = under_verification.unsqueeze(1)
    k = torch.arange(positions, device=n.device)
    a = torch.where(k[:-1] < n, accept, 0.0).clamp(0.0, 1.0)
    edge = a.new_zeros(batch, 1)
    length = torch.cat((edge, a.log().cumsum(1)), 1) + torch.cat(((1.0 - a).log(), edge), 1)

    excluded = (candidates[:, :-1] == drafts.unsqueeze(-1)) & (k[:-1] < n).unsqueeze(-1)
    left = torch.cat((log_q[:, :-1].masked_fill(excluded, -torch.inf), log_q[:, -1:]), 1)
    possible = ((k <= n) & (k < room.unsqueeze(1))).unsqueeze(-1)
    log_p = length.unsqueeze(-1) + left - left.logsumexp(-1, keepdim=True)
    # -inf where it is NaN, too: what is left of a position may be nothing, and a draft model may have failed
    log_p = torch.where(possible & (log_p > -torch.inf), log_p, -torch.inf).flatten(1)

    log_p, index = log_p.sort(dim=1, descending=True, stable=True)
    missing = max(branches - positions * per_position, 0)
    log_p = torch.nn.functional.pad(log_p[:, :branches], (0, missing), value=-torch.inf)
    index = torch.nn.functional.pad(index[:, :branches], (0, missing))
    there = log_p > -torch.inf
    accepted = torch.where(there, index // per_position, IMPOSSIBLE).to(torch.int32)
    return accepted, torch.where(there, candidates.flatten(1).gather(1, index), 0), log_p
