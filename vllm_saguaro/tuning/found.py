"""What a tuning run has found so far, and what is chosen of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_saguaro.simulation.world import World
from vllm_saguaro.tuning.candidates import SAGUARO, Load, Speeds, Tried, first_of_the_best, recommended
from vllm_saguaro.tuning.observations import Observations
from vllm_saguaro.tuning.settings import Settings


@dataclass
class Tuning:
    """All that was found. `worlds` by temperature; `predicted` by (K, N); `left_out`: candidates with why."""

    settings: Settings
    tried: list[Tried] = field(default_factory=list)
    observations: dict[Load, Observations] = field(default_factory=dict)
    worlds: dict[float, World] = field(default_factory=dict)
    predicted: dict[tuple[int, int], Speeds] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def plain(self) -> Speeds:
        """Tokens a second without speculation."""
        return self.tried[0].speeds

    @property
    def chosen(self) -> Tried:
        """The best of saguaro."""
        return first_of_the_best([each for each in self.tried if each.candidate.method == SAGUARO], self.plain)

    @property
    def recommended(self) -> str:
        """The method that was fastest."""
        others = [each for each in self.tried if each.candidate.method != SAGUARO]
        return recommended(self.chosen, others, self.plain)
