"""What the draft engine holds of a request: its trunk, its branches, and the tree that grows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import torch

from vllm_saguaro.algorithm.noise import KeySeeds, NoiseSeeds
from vllm_saguaro.algorithm.position_noise import PositionStems
from vllm_saguaro.algorithm.sampling import Candidates, SamplingRows
from vllm_saguaro.drafting.forecast import Forecast
from vllm_saguaro.messages import Noise, Sampling

NoiseNumbers = NoiseSeeds | KeySeeds | PositionStems
"""The integers that decide the noise of one request, by the number of the output token."""


class Drawing(IntEnum):
    """How a draft is drawn."""

    CERTAIN = 0
    """The likeliest token."""
    SAMPLED = 1
    """One drawn from q, with the draft's own random numbers."""
    COUPLED = 2
    """The one that the request's own noise picks."""


@dataclass(frozen=True, slots=True)
class Deflation:
    """Saguaro sampling as it was when a speculation was drawn: F_j of each position, and C. C = 1 is ordinary sampling.

    The rule is fixed before the tokens are drawn, and kept with them: the q of position j is sigma_{F_j, C}.
    """

    fan_out: tuple[int, ...] = ()
    c: float = 1.0


PLAIN = Deflation()


@dataclass(slots=True)
class Branch:
    """One predicted outcome being drafted: its own blocks from block `first` on, and what was drafted so far."""

    accepted: int
    bonus: int
    first: int
    blocks: list[int]
    row: int = -1
    """Row in the tree that grows this branch."""


@dataclass(slots=True)
class Trunk:
    """A request on the draft side: committed `tokens`, then the drafts under verification (`speculation`)."""

    tokens: list[int]
    sampling: Sampling
    noise: NoiseNumbers | None = None
    """The noise that target and draft share, where they do."""
    speculation: list[int] = field(default_factory=list)
    deflation: Deflation = PLAIN
    """Of the q that the speculation was drawn from."""
    backup: bool = False
    """Whether the speculation came from elsewhere, and not from a branch."""
    blocks: list[int] = field(default_factory=list)
    valid: int = 0
    hidden: torch.Tensor | None = None
    branches: list[Branch] = field(default_factory=list)
    tree: Tree | None = None
    forecast: Forecast | None = None
    """What was predicted of the outcome that is awaited, to learn from."""

    @property
    def length(self) -> int:
        """Tokens of the whole trunk, drafts under verification included."""
        return len(self.tokens) + len(self.speculation)

    @property
    def lacking(self) -> int:
        """How many tokens of the trunk have no KV yet: the length of `pending`."""
        return self.length - self.valid

    def pending(self) -> list[int]:
        """Tokens of the trunk whose KV is not there yet."""
        behind = self.valid - len(self.tokens)
        return self.speculation[behind:] if behind >= 0 else self.tokens[self.valid :] + self.speculation

    def noise_seeds(self, position: int, count: int) -> list[int]:
        """The integers that decide the noise of text positions `position` .. `position + count - 1`; 0 without."""
        if self.noise is None:
            return [0] * count
        first = position - self.sampling.prompt_length
        return [self.noise.at(first + i) for i in range(count)]

    def branch_of(self, accepted: int, bonus: int) -> Branch | None:
        """The branch that predicted this outcome."""
        for branch in self.branches:
            if (branch.accepted, branch.bonus) == (accepted, bonus):
                return branch
        return None


@dataclass(slots=True)
class Tree:
    """The branches of some requests, growing together: one row each, all at the same depth.

    next_ids [R] int64: token that each row feeds next; start [R]: position of the bonus token; blocks [R, W].
    hidden[i] [R, H]: states after feeding the i-th token; drafts[i] [R]: the token drafted from them; q[i]: what it was
    drawn from, None where all drafts are certain.
    """

    next_ids: np.ndarray
    start: np.ndarray
    blocks: np.ndarray
    depth_limit: int
    rule: DrawRule
    drafts: list[np.ndarray] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    q: list[Candidates | None] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Tokens drafted so far in every row."""
        return len(self.drafts)

    @property
    def finished(self) -> bool:
        """Whether every row has all of its tokens."""
        return self.depth >= self.depth_limit

    def take(self, rows: list[int]) -> Tree:
        """A tree that goes on with these rows alone, as rows 0, 1, ..; this one stays as it is."""
        index = torch.tensor(rows, dtype=torch.int64)
        return Tree(
            next_ids=self.next_ids[rows],
            start=self.start[rows],
            blocks=self.blocks[rows],
            depth_limit=self.depth_limit,
            rule=self.rule.take(index),
            drafts=[step[rows] for step in self.drafts],
            hidden=[states[index.to(states.device)] for states in self.hidden],
            q=[q and Candidates(q.tokens[index.to(q.q.device)], q.q[index.to(q.q.device)]) for q in self.q],
        )


@dataclass(frozen=True, slots=True)
class DrawRule:
    """How each row of a tree draws its drafts, one of `Drawing`. Fields that no row needs are None.

    kind [R] int64. noise [R, K] int64: the integers of each depth, for coupled rows. rows: for sampled rows, and for
    coupled ones with cuts. fan_out [R, K] int64 and c [R] float32: the deflation of sampled rows.
    `kinds` are those that occur. `positional`: the integers of the noise are stems (`Noise.POSITION`).
    """

    kinds: frozenset[Drawing]
    kind: torch.Tensor
    temperature: torch.Tensor
    noise: torch.Tensor | None
    rows: SamplingRows | None
    fan_out: torch.Tensor
    c: torch.Tensor
    deflation: Deflation
    positional: bool = False

    @property
    def all_certain(self) -> bool:
        """Whether all rows take the likeliest token."""
        return self.kinds == {Drawing.CERTAIN}

    def take(self, index: torch.Tensor) -> DrawRule:
        """The rule of some rows."""
        at = index.to(self.kind.device)
        return DrawRule(
            self.kinds,
            self.kind[at],
            self.temperature[at],
            None if self.noise is None else self.noise[at],
            self.rows and self.rows.take(at),
            self.fan_out[at],
            self.c[at],
            self.deflation,
            self.positional,
        )


def noise_of(sampling: Sampling) -> NoiseNumbers | None:
    """The integers that decide a request's noise, where it is known."""
    if not sampling.coupled:
        return None
    if sampling.noise is Noise.POSITION:
        return PositionStems(sampling.seed, sampling.prompt_length)
    return KeySeeds(sampling.seed) if sampling.noise is Noise.KEY else NoiseSeeds(sampling.seed)
