"""What a tuning run is asked for, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vllm_saguaro.benchmark import prompts
from vllm_saguaro.config import MAX_SPECULATIVE_TOKENS
from vllm_saguaro.tuning.candidates import Load

USUAL_BATCHES: Final = (1, 4, 16)
QUICK_BATCHES: Final = (1, 4)
USUAL_KS: Final = (1, 2, 3, 4, 6, 8)
SIZES: Final = (2, 4, 8, 12, 24, 48)
"""N that are predicted."""
LONGEST_PROMPT: Final = 512
MINUTES, QUICK_MINUTES = 10.0, 3.0

BUILT_IN: Final = (
    "The history of the lighthouse begins long before there were lamps to put in it. Fires were kept on hills above",
    "def median(values: list[float]) -> float:\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n",
    "Question: A train leaves at 9:40 and arrives at 12:05. How long does it travel?\nAnswer: Let us count the steps.",
    "Dear colleagues,\n\nthank you for coming to the meeting on Tuesday. Here is a summary of what was decided:\n\n1.",
    "import json\nfrom pathlib import Path\n\n\ndef read_settings(path: Path) -> dict:\n    ",
    "The three most common causes of a bicycle's chain falling off are, in this order:",
    "SELECT customers.name, SUM(orders.total) AS spent\nFROM customers JOIN orders ON",
    "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat. When the miller died,",
)
"""Plain texts, for a pair that has no prompts of its own."""


class TuningError(ValueError):
    """The run cannot be made; one line that says what to write instead."""


@dataclass(frozen=True)
class Settings:
    """`words`: what `vllm serve` would get. `fixed`: keys of the speculative config that the user has written himself.

    `tokens`: new tokens of each prompt. `seconds`: after which no further engine is started. `on_host`: whether the
    host hears of outcomes (model runner V1): an engine can then be watched, and has backups. `usual_placement`: what a
    start takes; `placements`: those to try beside it; `placements_left_out`: the others, each with the reason.
    `offline`: whether both models are folders of this machine.
    """

    target: str
    draft: str
    words: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    batches: tuple[int, ...] = USUAL_BATCHES
    temperatures: tuple[float, ...] = (0.0, 1.0)
    ks: tuple[int, ...] = USUAL_KS
    prompts: tuple[str, ...] = BUILT_IN
    prompt_tokens: int = LONGEST_PROMPT
    tokens: int = 64
    repetitions: int = 2
    seconds: float = 60 * MINUTES
    on_host: bool = True
    usual_placement: str = "process"
    placements: tuple[str, ...] = ("inline",)
    placements_left_out: Mapping[str, str] = field(default_factory=dict)
    offline: bool = True
    cores: tuple[int, ...] = (0,)

    @property
    def loads(self) -> list[Load]:
        """Every batch at every temperature."""
        return [(batch, temperature) for batch in self.batches for temperature in self.temperatures]

    def prompts_of(self, batch: int) -> int:
        """Prompts of a repetition: whole batches, three of a single request."""
        return max(batch, 3) if batch == 1 else batch


def default_batches(most: int, asked: bool, quick: bool) -> tuple[int, ...]:
    """1, 4, 16 ... up to `most` requests, with `most` itself where the user has `asked` for that number.

    `quick`: 1 and 4 alone.
    """
    if quick or not asked:
        return tuple(batch for batch in (QUICK_BATCHES if quick else USUAL_BATCHES) if batch <= most)
    found = [1]
    while found[-1] * 4 < most:
        found.append(found[-1] * 4)
    return tuple(dict.fromkeys([*found, most]))


def check_ks(ks: Sequence[int]) -> tuple[int, ...]:
    """In order, each once. Raises TuningError."""
    for k in ks:
        if not 1 <= k <= MAX_SPECULATIVE_TOKENS:
            raise TuningError(f"--k {k}: write numbers from 1 to {MAX_SPECULATIVE_TOKENS}")
    return tuple(sorted(set(ks)))


def check_loads(batches: Sequence[int], temperatures: Sequence[float], most: int) -> None:
    """Raises TuningError for a load that the engine would not take."""
    for batch in batches:
        if not 1 <= batch <= most:
            raise TuningError(
                f"--batch {batch}: the engine serves 1 to {most} requests at once; write such a number, or another "
                "--max-num-seqs after --"
            )
    for temperature in temperatures:
        if not 0 <= temperature <= 2:
            raise TuningError(f"--temperature {temperature:g}: write numbers from 0 to 2")


def read_prompts(path: Path | None, target: str) -> tuple[str, ...]:
    """Of a JSONL file with lines of {"prompt": ...}: the one given, the pair's own, or the built-in texts.

    Raises TuningError for a file that has none.
    """
    own = Path(target).parent / "prompts.jsonl"
    if path is None and not own.is_file():
        return BUILT_IN
    path = path or own
    try:
        found = tuple(prompts.read_prompts(path))
    except (OSError, ValueError) as error:
        raise TuningError(f"--prompt-file: {error}") from None
    if not all(found) or not found:
        raise TuningError(f'--prompt-file: {path} has no text in it: write lines of {{"prompt": "..."}}')
    return found


def enough(texts: Sequence[str], most: int) -> tuple[str, ...]:
    """At least `most` of them: over again from the beginning where there are fewer."""
    return tuple(texts[place % len(texts)] for place in range(max(most, 1)))


def refuse_ranks(ranks: int) -> None:
    """Raises TuningError for a target of several ranks, whose engine is not in one process."""
    if ranks > 1:
        raise TuningError(
            f"tune measures a target on one rank, not {ranks}: leave --tensor-parallel-size out, and keep K and N of "
            "the result"
        )


def room_for_prompts(longest: int, tokens: int, k: int) -> int:
    """Tokens of a prompt at most, beside what is made. Raises TuningError where there is no room for any."""
    room = longest - tokens - k - 2
    if tokens < 8 or room < 8:
        raise TuningError(f"--tokens {tokens}: write a number from 8 to {longest - k - 10}, the model holds {longest}")
    return min(room, LONGEST_PROMPT)
