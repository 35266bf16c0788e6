"""The target side of the state machine: requests as vLLM's scheduler has them, and what the target samples for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from tests.unit.drafting.fake_model import FakeModel
from tests.unit.drafting.simulated_target import SimulatedTarget
from vllm_saguaro.algorithm.noise import NoiseSeeds
from vllm_saguaro.messages import Noise, Sampling

STRANGE = 3
"""Tokens that the target has and the draft has not."""


class Kind(StrEnum):
    """How a request samples."""

    GREEDY = "greedy"
    COUPLED = "coupled"
    """With a seed, whose noise the draft side knows: what it drafts is certain again."""
    SAMPLED = "sampled"


@dataclass(slots=True)
class Request:
    """A request: its text, what of it the target has computed, and the drafts that were handed over for it."""

    name: str
    prompt: list[int]
    limit: int
    """Ends when its text has this many tokens."""
    chunk: int
    """Tokens of it that the target reads in one pass, at most."""
    kind: Kind
    text: list[int] = field(default_factory=list)
    computed: int = 0
    handed: list[int] = field(default_factory=list)
    waiting: bool = False
    """Preempted, and not resumed yet."""

    def __post_init__(self) -> None:
        self.text = list(self.prompt)

    @property
    def sampling(self) -> Sampling:
        if self.kind is Kind.GREEDY:
            return Sampling()
        noise = Noise.SEED if self.kind is Kind.COUPLED else Noise.UNKNOWN
        return Sampling(temperature=0.75, noise=noise, seed=5, prompt_length=len(self.prompt))

    @property
    def done(self) -> bool:
        return len(self.text) >= self.limit

    def preempt(self) -> None:
        """What was computed is lost, and the drafts with it."""
        self.computed, self.handed, self.waiting = 0, [], True

    def run(self, target: SimulatedTarget, drafts: Sequence[int]) -> list[int]:
        """One pass of the target over these drafts, or over a chunk of what is not computed yet.

        The sampled tokens: none as long as there are more chunks.
        """
        if len(self.text) - self.computed > self.chunk:
            self.computed += self.chunk
            return []
        sampled = target.verify(self.text, drafts)
        self.text += sampled
        self.computed, self.handed = len(self.text) - 1, []
        return sampled

    def guess(self, count: int) -> list[int]:
        """What its own text suggests: tokens that the draft may not even have."""
        return self.text[-1 : -1 - count : -1] if len(self.text) % 3 else []


class Oracle:
    """What the draft drafts after a text, if all goes well, from plain lists."""

    def __init__(self, vocab_size: int) -> None:
        self.model = FakeModel(max_length=200, vocab_size=vocab_size)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def logits_after(self, text: Sequence[int]) -> torch.Tensor:
        """Logits [V] after this text: worked out once, asked for often."""
        key = tuple(text)
        if key not in self._known:
            self._known[key] = self.model.logits_after(text)
        return self._known[key]

    def next_draft(self, request: Request, text: Sequence[int]) -> int | None:
        """The certain draft after this text of a request; None where it is drawn from q."""
        logits = self.logits_after(text)
        if request.kind is Kind.SAMPLED:
            return None
        if request.kind is Kind.GREEDY:
            return int(logits.argmax())
        noise = NoiseSeeds(request.sampling.seed).at(len(text) - len(request.prompt))
        return int(self.model.race(logits[None] / request.sampling.temperature, torch.tensor([noise])))

    def q(self, request: Request, text: Sequence[int]) -> torch.Tensor:
        """What a draft after this text is drawn from [V]."""
        return torch.softmax(self.logits_after(text) / request.sampling.temperature, dim=-1)


class WiderTarget(SimulatedTarget):
    """Takes the certain draft of a request most of the time, and now and then a token that the draft has not."""

    def __init__(self, oracle: Oracle, request: Request, coin: int = 0) -> None:
        super().__init__(oracle.model, agreement=0.8, seed=99 + coin)
        self._oracle = oracle
        self._request = request
        self._wish = FakeModel(max_length=200, vocab_size=300, seed=7)

    def next_token(self, tokens: Sequence[int]) -> int:
        """What is sampled after this text: for a request that is not `SAMPLED` always the same."""
        if int(self._wish.logits_after(tokens).argmax()) == 0:
            return self._oracle.model.vocab_size + len(tokens) % STRANGE
        usual, drafted = super().next_token(tokens), self._oracle.next_draft(self._request, tokens)
        agrees = usual == int(self._oracle.logits_after(tokens).argmax())
        return drafted if agrees and drafted is not None else usual
