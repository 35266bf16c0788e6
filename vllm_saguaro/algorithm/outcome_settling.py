"""What the outcomes of a step say of the texts, and the drafts that the tables have for them, without the host.

Shapes: S slots (the last is nobody's: padding works there), T tokens remembered of a text that is still being read, N
branches a slot, K drafts a branch; B rows of the step. Every shape depends on the shapes of the arguments alone and
nothing waits for the device, so a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_saguaro.algorithm.outcome_lookup import MISS, outcome_lookup


def settle_outcomes(
    alive: Tensor,
    read: Tensor,
    length: Tensor,
    admitted: Tensor,
    tail: Tensor,
    accepted_keys: Tensor,
    bonus_keys: Tensor,
    drafts: Tensor,
    depth: Tensor,
    slots: Tensor,
    accepted: Tensor,
    bonus: Tensor,
    lengths: Tensor,
    max_length: int,
    vocab_size: int,
    branch: Tensor,
    speculation: Tensor,
    tokens: Tensor,
    ready: Tensor,
) -> None:
    """Take in each row's outcome, and find its drafts. Changes `alive`, `length`, `tail` and the last four in place.

    alive     [S] bool   what is known of the text is right; false once the two sides no longer talk of the same text
    read      [S] bool   the draft has the text's KV
    length    [S] int32  tokens of the text
    admitted  [S] int32  tokens when it was told
    tail      [S, T]     the tokens since, int64, of a text that is not read: it has no drafts, so a step brings it one
    accepted_keys, bonus_keys, drafts, depth: the tables, as `outcome_lookup` has them
    slots     [B] int64  all different, but for the last slot
    accepted  [B] int32  k; negative: the row got no token, and changes nothing
    bonus     [B] int64  t*
    lengths   [B] int32  tokens of the text with the bonus token

    A row's text goes on being right where `lengths` is what k says, the bonus token is one that the draft knows
    (`vocab_size`), and the draft can hold it (`max_length`, and T while it is read). branch [B] int64: the branch of a
    text that is right and read, with the row's outcome and all K drafts; MISS elsewhere. speculation and tokens [B, K]
    int64: its drafts, or the bonus token (0 where there is none). ready [B] int32: K or 0.
    """
    nobody, num_drafts = alive.shape[0] - 1, drafts.shape[2]
    token = accepted >= 0
    agrees = (lengths == length[slots] + accepted + 1) & (lengths <= max_length)
    agrees &= (bonus >= 0) & (bonus < vocab_size)
    right = alive[slots] & (agrees | ~token)
    waiting = token & right & ~read[slots]
    behind = lengths - 1 - admitted[slots]
    right &= ~waiting | ((accepted == 0) & (behind >= 0) & (behind < tail.shape[1]))
    alive[slots] = right
    length[slots] = torch.where(token, lengths, length[slots])
    noted = waiting & right
    place = torch.where(noted, slots, nobody), behind.clamp(0, tail.shape[1] - 1).long()
    tail[place] = torch.where(noted, bonus, tail[place])

    active = token & right & read[slots]
    at = torch.where(active, slots, nobody)
    filler = torch.where(token, bonus, 0)
    found, its, count = outcome_lookup(
        accepted_keys, bonus_keys, drafts, depth, at, torch.where(active, accepted, -1), filler
    )
    hit = active & (count == num_drafts)
    drafted = torch.where(hit.unsqueeze(1), its, filler.unsqueeze(1))
    branch.copy_(torch.where(hit, found, MISS))
    speculation.copy_(drafted)
    tokens.copy_(drafted)
    ready.copy_(torch.where(hit, num_drafts, 0))
