"""Whether two engines write the same: word for word at temperature 0, in distribution above it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

SURPRISE = 4.5
"""Standard deviations of a chi-square beyond which two samples are held to be of different distributions."""


def differences(
    plain: Sequence[Sequence[int]], gaps: Sequence[Sequence[float]], other: Sequence[Sequence[int]], tie: float
) -> tuple[int, list[str]]:
    """(how many texts are equal, what is wrong with the others) at temperature 0.

    `gaps` says at every place of the plain texts by how much (nats) the likeliest token beat the second. Engines round
    differently with the size of the batch: a text may go another way where the gap is no more than `tie`.
    """
    equal, wrong = 0, []
    if len(plain) != len(other):
        return 0, [f"{len(other)} texts, not {len(plain)}"]
    for number, (mine, gap, yours) in enumerate(zip(plain, gaps, other, strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(mine, yours, strict=False)) if a != b), None)
        if place is None and len(mine) == len(yours):
            equal += 1
        elif place is None:
            wrong.append(f"text {number} has {len(yours)} tokens, not {len(mine)}")
        elif gap[place] > tie:
            wrong.append(
                f"text {number}, token {place}: {yours[place]} for {mine[place]}, which was {gap[place]:.2f} nats ahead"
            )
    return equal, wrong


def surprises(plain: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> list[float]:
    """By place: how many standard deviations lie between two samples of many texts after one prompt.

    The chi-square of the two-sample test over the tokens that are common enough, as a normal deviate (Wilson and
    Hilferty); 0 where one token alone is.
    """
    return [
        _surprise(Counter(text[place] for text in plain), Counter(text[place] for text in other))
        for place in range(min(map(len, (*plain, *other))))
    ]


def _surprise(one: Counter[int], other: Counter[int]) -> float:
    first, second = sum(one.values()), sum(other.values())
    rare = [0, 0]
    cells: list[tuple[int, int]] = []
    for token in one.keys() | other.keys():
        if one[token] + other[token] >= 10:
            cells.append((one[token], other[token]))
        else:
            rare[0] += one[token]
            rare[1] += other[token]
    if sum(rare) >= 10:
        cells.append((rare[0], rare[1]))
    freedom = len(cells) - 1
    if freedom < 1:
        return 0.0
    a, b = math.sqrt(second / first), math.sqrt(first / second)
    square = sum((a * x - b * y) ** 2 / (x + y) for x, y in cells)
    variance = 2 / (9 * freedom)
    return ((square / freedom) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)
