"""Random arguments for each operation of the device, and what makes two implementations of one agree.

A case holds what its operation is called with. The numbers are chosen so that ties, misses, padding, impossible
outcomes, the ends of tables and blocks, and values that must not be looked at (NaN in the padding) are all common.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_saguaro.algorithm.outcome_ranking import ranked_outcomes

Operation = Callable[..., Any]

_NEAR = 1e-4
"""Log probabilities are equal if they differ by no more: implementations sum in different orders."""


@dataclass(frozen=True, slots=True)
class Case:
    """The arguments that an operation is called with; it may change the tensors in them."""

    operation: str
    arguments: tuple[Any, ...]

    def copied(self, device: torch.device | None = None) -> tuple[Any, ...]:
        """The arguments anew, with the strides they have, on `device` if one is given."""
        return tuple(_copied(a, device or a.device) if isinstance(a, Tensor) else a for a in self.arguments)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes that a case is made for; each operation uses those that concern it."""

    slots: int = 4
    rows: int = 3
    branches: int = 5
    drafts: int = 3
    candidates: int = 8
    width: int = 6
    block_size: int = 4

    @property
    def owned(self) -> int:
        """P, the blocks that a branch owns."""
        return -(-(self.block_size - 1 + self.drafts) // self.block_size)


def make_case(operation: str, sizes: Sizes, seed: int, *, strided: bool = False) -> Case:
    """A random case; with `strided`, no tensor of more than one element is contiguous.

    Raises ValueError for an operation that does not exist.
    """
    if operation not in MAKERS:
        raise ValueError(f"there is no operation {operation!r}: it is one of {', '.join(MAKERS)}")
    g = torch.Generator().manual_seed(seed)
    arguments = MAKERS[operation](sizes, g)
    if strided:
        arguments = tuple(
            _spread(a, keep_inner=operation == "copy_blocks") if isinstance(a, Tensor) else a for a in arguments
        )
    return Case(operation, arguments)


def disagreement(case: Case, one: Operation, other: Operation, device: torch.device | None = None) -> str:
    """What the two implementations do differently with the same arguments (each on a copy), in words; "" if nothing.

    `device`: where `one` runs; what it gives and changes is compared on the CPU, where `other` runs.
    """
    mine, yours = case.copied(device), case.copied()
    got, expected = one(*mine), other(*yours)
    for place, (a, b) in enumerate(zip(mine, yours, strict=True)):
        if isinstance(a, Tensor) and not _same(case.operation, a.cpu(), b):
            return f"argument {place} is afterwards {a.cpu()}, not {b}"
    if case.operation == "ranked_outcomes":
        return _ranking_disagreement(case, tuple(t.cpu() for t in got))
    results = ((each,) if isinstance(each, Tensor) else each or () for each in (got, expected))
    for place, (a, b) in enumerate(zip(*results, strict=True)):
        if a.dtype != b.dtype or not torch.equal(a.cpu(), b):
            return f"result {place} is {a.cpu()}, not {b}"
    return ""


def _ranking_disagreement(case: Case, got: tuple[Tensor, Tensor, Tensor]) -> str:
    """As above, for the ranking: `got` may order outcomes of different k differently where they are nearly equal."""
    candidates, log_q, drafts, n, accept, branches, room = case.arguments
    batch, positions, per_position = candidates.shape
    shapes = [(t.dtype, tuple(t.shape)) for t in got]
    if shapes != [(dtype, (batch, branches)) for dtype in (torch.int32, torch.int64, torch.float32)]:
        return f"results have types and shapes {shapes}"
    every = ranked_outcomes(candidates, log_q, drafts, n, accept, max(branches, positions * per_position), room)
    for b in range(batch):
        ks, tokens, values = (t[b].tolist() for t in every)
        order = [(k, t, p) for k, t, p in zip(ks, tokens, values, strict=True) if k >= 0]
        best = {(k, t): p for k, t, p in order}
        rows = list(zip(*(t[b].tolist() for t in got), strict=True))
        for place, (k, token, value) in enumerate(rows):
            if place >= len(order):
                if (k, token, value) != (-1, 0, -math.inf):
                    return f"row {b} has {k, token, value} in place {place}, where there are {len(order)} outcomes"
            elif abs(value - order[place][2]) > _NEAR or abs(value - best.get((k, token), math.inf)) > _NEAR:
                return f"row {b} has {k, token, value} in place {place}, not {order[place]}"
        for k in range(positions):  # of one k, the order is that of exact numbers
            mine = [token for j, token, _ in rows if j == k]
            yours = [token for j, token, _ in order if j == k]
            if mine != yours[: len(mine)]:
                return f"row {b} has the bonus tokens {mine} at k = {k}, not {yours}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------


def lookup_arguments(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    """What `algorithm.outcome_lookup` is called with."""
    keys = _integers(-1, sizes.drafts + 1, (sizes.slots, sizes.branches), g).to(torch.int32)
    bonus_keys = _integers(-1, 4, (sizes.slots, sizes.branches), g)
    drafts = _integers(0, 1000, (sizes.slots, sizes.branches, sizes.drafts), g)
    depth = _integers(0, sizes.drafts + 1, (sizes.slots,), g).to(torch.int32)
    slots = _integers(0, sizes.slots, (sizes.rows,), g)
    accepted = _integers(-1, sizes.drafts + 1, (sizes.rows,), g).to(torch.int32)
    return keys, bonus_keys, drafts, depth, slots, accepted, _integers(-1, 4, (sizes.rows,), g)


def _settling(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    slots, rows, remembered, vocabulary = sizes.slots + 1, sizes.rows, sizes.width, 4
    alive, read = torch.rand(slots, generator=g) < 0.9, torch.rand(slots, generator=g) < 0.6
    admitted = _integers(1, 4, (slots,), g).to(torch.int32)
    since = _integers(0, remembered + 2, (slots,), g)
    since = torch.where(torch.rand(slots, generator=g) < 0.3, remembered, since)  # often more than is remembered
    length = admitted + since.to(torch.int32)
    tail = _integers(100, 200, (slots, remembered), g)
    keys, bonus_keys, drafts, depth, *_ = lookup_arguments(Sizes(slots, 0, sizes.branches, sizes.drafts), g)
    depth = torch.where(torch.rand(slots, generator=g) < 0.7, sizes.drafts, depth).to(torch.int32)
    chosen = torch.full((rows,), sizes.slots)
    real = min(rows, sizes.slots)
    chosen[:real] = torch.randperm(sizes.slots, generator=g)[:real]
    accepted = torch.where(torch.rand(rows, generator=g) < 0.3, 0, _integers(-1, sizes.drafts + 1, (rows,), g))
    predicted = chosen, _integers(0, sizes.branches, (rows,), g)
    hit = torch.rand(rows, generator=g) < 0.5
    accepted = torch.where(hit, keys[predicted], accepted).to(torch.int32)
    bonus = torch.where(hit, bonus_keys[predicted], _integers(-1, vocabulary + 1, (rows,), g))
    undrafted = ~read[chosen] & (torch.rand(rows, generator=g) < 0.5)  # as most texts that are still being read
    accepted = torch.where(undrafted, 0, accepted)
    accepted[real:] = -1
    lengths = length[chosen] + accepted + 1
    lengths += (torch.rand(rows, generator=g) < 0.1).to(torch.int32)
    results = torch.full((rows,), 9), *torch.full((2, rows, sizes.drafts), 9), torch.full((rows,), 9, dtype=torch.int32)
    texts = alive, read, length, admitted, tail
    step = chosen, accepted, bonus, lengths
    return *texts, keys, bonus_keys, drafts, depth, *step, 3 + remembered, vocabulary, *results


def _ranking(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    rows, positions, per_position = shape = sizes.rows, sizes.drafts + 1, sizes.candidates
    vocabulary = 2 * per_position
    candidates = torch.rand(rows, positions, vocabulary, generator=g).argsort(-1)[..., :per_position]
    # Multiples of 1/16: equal ones are common and equal, others far apart
    log_q = -_integers(0, 160, shape, g).to(torch.float32) / 16
    log_q[torch.rand(shape, generator=g) < 0.1] = -torch.inf
    log_q[torch.rand(shape[:2], generator=g) < 0.05] = -torch.inf
    likely = candidates[:, :-1, 0]
    drafts = torch.where(torch.rand(likely.shape, generator=g) < 0.7, likely, likely + vocabulary)
    n = _integers(0, positions, (rows,), g).to(torch.int32)
    accept = _integers(0, 9, (rows, sizes.drafts), g).to(torch.float32) / 8
    padding = torch.arange(sizes.drafts) >= n.unsqueeze(1)
    accept[padding] = torch.nan
    log_q[:, 1:][padding] = torch.nan
    drafts = torch.where(padding & (torch.rand(likely.shape, generator=g) < 0.5), -(2**40), drafts)
    room = _integers(0, positions + 2, (rows,), g).to(torch.int32)
    return candidates, log_q, drafts, n, accept, sizes.branches, room


def _tables(sizes: Sizes, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """The blocks of all slots, none twice."""
    count = sizes.slots * (sizes.width + sizes.branches * sizes.owned)
    blocks = torch.randperm(count, generator=g).to(torch.int32)
    main = blocks[: sizes.slots * sizes.width].view(sizes.slots, sizes.width)
    return main, blocks[main.numel() :].view(sizes.slots, sizes.branches, sizes.owned)


def _fork(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    main, private = _tables(sizes, g)
    slots = _integers(0, sizes.slots, (sizes.rows,), g)
    lengths = _integers(0, (sizes.width + 1) * sizes.block_size + 1, (sizes.rows,), g).to(torch.int32)
    accepted = _integers(-1, sizes.drafts + 1, (sizes.rows, sizes.branches), g).to(torch.int32)
    return main, private, slots, lengths, accepted, sizes.block_size


def _copies(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    count = sizes.rows * sizes.branches
    blocks = 2 * count + 3
    dtype = (torch.float32, torch.bfloat16, torch.uint8, torch.float64)[int(_integers(0, 4, (1,), g))]
    # The halves of a layer together or apart, and tokens before heads or after them, as vLLM's backends have it
    shape = (2, blocks, 2, sizes.block_size, sizes.candidates, 3)
    pages = (100 * torch.rand(shape, generator=g)).to(dtype)
    layout = int(_integers(0, 4, (1,), g))
    if layout == 3:  # a block as so many bytes
        pages = pages.flatten(2)
    elif layout:
        pages = pages.transpose(3, 4).contiguous().transpose(3, 4)
    if layout == 2:
        pages = pages.transpose(1, 2).contiguous().transpose(1, 2)
    order = torch.randperm(blocks, generator=g).to(torch.int32)
    destination = order[:count].clone()
    source = order[count:][_integers(0, blocks - count, (count,), g)]
    nothing = torch.rand(count, generator=g) < float(torch.rand(1, generator=g))
    return pages, source.masked_fill(nothing, -1), destination.masked_fill(nothing, -1)


def _adoption(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    main, private = _tables(sizes, g)
    hits = min(sizes.rows, sizes.slots)
    slots = _integers(0, sizes.slots, (sizes.rows,), g)
    slots[:hits] = torch.randperm(sizes.slots, generator=g)[:hits]
    branch = torch.full((sizes.rows,), -1, dtype=torch.int64)
    branch[:hits] = _integers(-1, sizes.branches, (hits,), g)
    return main, private, slots, branch, _integers(0, sizes.width + 2, (sizes.rows,), g)


def _steps(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    count = sizes.rows * sizes.branches
    tables = _integers(0, 2**31 - 1, (count, sizes.width), g).to(torch.int32)
    limit = sizes.width * sizes.block_size - int(_integers(0, sizes.block_size, (1,), g))
    positions = _integers(-1, limit + 3, (count,), g)
    tokens = _integers(0, 2**40, (count,), g)
    ids, slot_mapping = torch.full((2, count), -7).unbind()
    lengths = torch.full((count,), -7, dtype=torch.int32)
    return tokens, positions, tables, sizes.block_size, limit, ids, lengths, slot_mapping


def _noise(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    rows, vocabulary = sizes.rows * sizes.branches, sizes.width * sizes.candidates
    logits = 20 * torch.rand(rows, vocabulary, generator=g) - 10
    logits[torch.rand(rows, vocabulary, generator=g) < 0.1] = -torch.inf
    noisy = torch.rand(rows, generator=g) < 0.7
    temperature = (0.1 + 2 * torch.rand(rows, generator=g)).masked_fill(~noisy, 0.0)
    return logits, temperature, _integers(0, 2**32, (rows,), g), noisy


def _copying(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    words = _integers(-(2**62), 2**62, (sizes.slots, sizes.width + 2), g)
    view = words[:, 1] if sizes.branches % 2 else words[:, 1:-1]
    return view, _integers(0, sizes.slots, (sizes.rows,), g)


def _copying_branches(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    cells = _integers(-(2**62), 2**62, (sizes.slots, sizes.drafts, sizes.branches, sizes.candidates), g)
    return cells, _integers(0, sizes.slots, (sizes.rows,), g), _integers(0, sizes.branches, (sizes.rows,), g)


def _taking(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    slots, rows, branches, depths = sizes.slots, min(sizes.rows, sizes.slots), sizes.branches, sizes.drafts
    vocabulary = 1000
    chosen = torch.randperm(slots, generator=g)[:rows]
    state = torch.stack([_integers(0, high, (slots,), g) for high in (3, 5, depths + 1)], 1)
    keys = _integers(-1, depths + 1, (rows, branches), g)
    bonus_keys = _integers(0, 4, (rows, branches), g)
    drafts = _integers(0, vocabulary, (rows, depths * branches), g)
    drafts[torch.rand(drafts.shape, generator=g) < 0.02] = vocabulary  # no token
    unsigned = _integers(-(2**31), 2**31, keys.shape, g) << 32  # what else a word may be
    strange = torch.rand(keys.shape, generator=g) < 0.1
    body = torch.cat((torch.where(strange, unsigned, keys << 32) | bonus_keys, drafts), 1)
    body[:, branches:] |= _integers(0, 2, (rows, 1), g) << 40  # the upper half of a draft says nothing

    before = 2 * _integers(0, 4, (rows,), g)
    changed, odd = (torch.rand(rows, generator=g) < share for share in (0.1, 0.1))
    before += odd
    count, depth = (_mostly(most, rows, g) for most in (branches, depths))
    of = state[chosen, :2] + (torch.rand(rows, 2, generator=g) < 0.1)
    head = torch.stack((before, of[:, 0], of[:, 1], count, depth, _integers(0, 2**40, (rows,), g)), 1)

    accepted = _integers(-1, depths + 1, (rows,), g)
    bonus = torch.where(torch.rand(rows, generator=g) < 0.2, _integers(-(2**40), 2**40, (rows,), g), 0)
    predicted = torch.arange(rows), _integers(0, branches, (rows,), g)
    hit = torch.rand(rows, generator=g) < 0.7
    accepted, bonus = torch.where(hit, keys[predicted], accepted), torch.where(hit, bonus_keys[predicted], bonus)
    verified = torch.maximum(accepted, _integers(0, depths + 1, (rows,), g))
    small = [t.to(torch.int32) for t in (accepted, verified, _integers(1, 2**20, (rows,), g))]
    outcomes = chosen, small[0], small[1], bonus, small[2]
    told = torch.full((rows, 8 + depths), 9), torch.full((rows, 3), 9), torch.full((rows,), 9)
    given = torch.full((rows, depths), 9), torch.full((rows,), 9, dtype=torch.int32)
    return before, head, body, before + 2 * changed, state, *outcomes, vocabulary, *told, *given


def _sealing(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    words = 8 + sizes.drafts
    record = _integers(-(2**62), 2**62, (3 + sizes.slots * words,), g)
    rows = min(sizes.rows, sizes.slots)
    number, head = int(_integers(0, 2**20, (1,), g)), int(_integers(-(2**62), 2**62, (1,), g))
    return record, rows, words, number, head


def _agreement(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    fed = _integers(0, sizes.drafts + 1, (sizes.rows,), g)  # drafts of each request
    begins = torch.cat((torch.zeros(1, dtype=torch.int64), (fed + 1).cumsum(0)))
    places = torch.cat([torch.arange(int(n) + 1) for n in fed] or [torch.zeros(0, dtype=torch.int64)])
    drawn = _integers(-1, 2, places.shape, g)
    ahead = torch.cat((torch.zeros(1, dtype=torch.int64), drawn))[:-1]
    drafts = torch.where(torch.rand(places.shape, generator=g) < 0.8, ahead, _integers(-1, 2, places.shape, g))
    return drawn, drafts.to(torch.int32), begins.to(torch.int32), places.to(torch.int32), sizes.drafts


def _gathering(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    slots, rows = sizes.slots, min(sizes.rows, sizes.slots)
    chosen = torch.randperm(slots, generator=g)[:rows]
    counts = [_integers(0, sizes.drafts + 2, (rows,), g).to(torch.int32) for _ in range(2)]
    newest, lengths = _integers(0, 2**40, (slots, 1), g), _integers(0, 2**31 - 1, (slots,), g).to(torch.int32)
    return chosen, *counts, newest, lengths, torch.rand(slots, generator=g), torch.rand(slots, generator=g) < 0.3


def _booking(sizes: Sizes, g: torch.Generator) -> tuple[Any, ...]:
    slots, rows, depths, last = sizes.slots, min(sizes.rows, sizes.slots), sizes.drafts, 1000
    chosen = torch.randperm(slots, generator=g)[:rows]
    drafts = _integers(0, last + 1, (rows, depths), g)
    strange = torch.rand(drafts.shape, generator=g) < 0.2
    drafts = torch.where(strange, _integers(-(2**40), 2**40, drafts.shape, g), drafts)
    accepted, depth = (_integers(least, depths + 1, (rows,), g).to(torch.int32) for least in (-1, 0))
    most = torch.where(torch.rand(slots, generator=g) < 0.3, 0, _integers(1, depths + 1, (slots,), g)).to(torch.int32)
    booked = torch.full((rows, depths), 9), torch.full((slots,), 9, dtype=torch.int32), _integers(0, 9, (4,), g)
    return drafts, depth, chosen, accepted, most, last, *booked


MAKERS: dict[str, Callable[[Sizes, torch.Generator], tuple[Any, ...]]] = {
    "settle_outcomes": _settling,
    "ranked_outcomes": _ranking,
    "fork": _fork,
    "copy_blocks": _copies,
    "adopt": _adoption,
    "branch_step": _steps,
    "add_noise": _noise,
    "copy_rows": _copying,
    "copy_branches": _copying_branches,
    "take_drafts": _taking,
    "seal_record": _sealing,
    "agreed": _agreement,
    "gather_outcomes": _gathering,
    "book_drafts": _booking,
}
"""What makes the arguments of each operation."""


def _integers(low: int, high: int, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """Any of low .. high - 1."""
    return torch.randint(low, high, shape, generator=g, dtype=torch.int64)


def _mostly(most: int, rows: int, g: torch.Generator) -> Tensor:
    """`most` in each row but a few, which have anything from -1 to one more than that, more often one more."""
    others = torch.where(torch.rand(rows, generator=g) < 0.4, most + 1, _integers(-1, most + 2, (rows,), g))
    return torch.where(torch.rand(rows, generator=g) < 0.7, most, others)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    """The same values with the same strides, in memory of its own."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return copy.copy_(tensor)


def _spread(tensor: Tensor, *, keep_inner: bool) -> Tensor:
    """The same values with gaps between them; with `keep_inner`, between those along the first two dimensions only."""
    strides = list(tensor.stride())
    if not keep_inner:
        strides = [3 * s for s in strides]
    elif tensor.dim() > 2:
        strides[0] += 5 * max(strides)
    copy = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype)
    return copy.copy_(tensor)


def _same(operation: str, one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; those with noise, to which each takes logarithms of its own, nearly so."""
    if operation == "add_noise" and one.is_floating_point():
        return torch.allclose(one, other, rtol=1e-5, atol=_NEAR)
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    """The tensor, with NaN equal to NaN."""
    return torch.nan_to_num(tensor, nan=12345.0) if tensor.is_floating_point() else tensor
