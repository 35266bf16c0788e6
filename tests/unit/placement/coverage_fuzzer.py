"""A small coverage-guided fuzzer: of the inputs that it makes it keeps those that reach something new, and goes on from
them. Without a compiler and without a package; the same numbers give the same inputs.

What an input reaches are the steps from line to line in the files that are watched, and about how often each was taken
(as AFL counts: 1, 2-3, 4-7, ..).
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

Arc = tuple[str, int, int]
"""File, line, and the line after it."""
_TELLING = (0, 1, 2, 3, 4, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


@dataclass(frozen=True)
class Found:
    """An input that the target does not stand, which number it had, and what the target did."""

    data: bytes
    number: int
    error: Exception


@dataclass
class CoverageFuzzer:
    """Looks for bytes that `target` does not stand.

    `target` raises nothing for what it takes, one of `refusals` for what it refuses; any other exception is a find.
    `guided` False: only the seeds are gone on from.
    """

    target: Callable[[bytes], object]
    watched: Collection[Path]
    seeds: Sequence[bytes]
    refusals: tuple[type[Exception], ...] = ()
    guided: bool = True
    seed: int = 0
    corpus: list[bytes] = field(default_factory=list)
    reached: set[tuple[Arc, int]] = field(default_factory=set)

    def run(self, inputs: int) -> Found | None:
        """Try so many inputs, the seeds first; the first find, or None."""
        chance, files = random.Random(self.seed), {str(path) for path in self.watched}
        self.corpus = list(self.seeds)
        for number in range(inputs):
            data = self.seeds[number] if number < len(self.seeds) else self._mutated(chance)
            arcs: Counter[Arc] = Counter()
            error = self._try(data, files, arcs)
            if error is not None:
                return Found(data, number, error)
            new = {(arc, count.bit_length()) for arc, count in arcs.items()} - self.reached
            if new and self.guided:
                self.reached |= new
                self.corpus.append(data)
        return None

    def _try(self, data: bytes, files: Collection[str], arcs: Counter[Arc]) -> Exception | None:
        before = sys.gettrace()
        sys.settrace(_tracer(files, arcs))
        try:
            self.target(data)
        except self.refusals:
            return None
        except Exception as error:
            return error
        finally:
            sys.settrace(before)
        return None

    def _mutated(self, chance: random.Random) -> bytes:
        """One of the corpus, the newest oftener, changed in one to four ways."""
        newest = self.corpus[-16:]
        data = bytearray(chance.choice(newest if chance.random() < 0.5 else self.corpus))
        for _ in range(chance.randint(1, 4)):
            chance.choice(_WAYS)(data, chance, self.corpus)
        return bytes(data[:4096])


def _tracer(files: Collection[str], arcs: Counter[Arc]) -> Callable[[FrameType, str, Any], Any]:
    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        file = frame.f_code.co_filename
        if file not in files:
            return None
        before = -frame.f_lineno

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            after = frame.f_lineno if event == "line" else -1
            arcs[file, before, after] += 1
            before = after
            return step

        return step

    return enter


# ---- ways to change bytes -------------------------------------------------------------------------------------------


def _flip(data: bytearray, chance: random.Random, corpus: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(data: bytearray, chance: random.Random, corpus: Sequence[bytes]) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.randrange(256)


def _add(data: bytearray, chance: random.Random, corpus: Sequence[bytes]) -> None:
    if data:
        at = chance.randrange(len(data))
        data[at] = (data[at] + chance.choice((-4, -2, -1, 1, 2, 4))) % 256


def _tell(data: bytearray, chance: random.Random, corpus: Sequence[bytes]) -> None:
    """A number where numbers go wrong, 2, 4 or 8 bytes wide, often where a number stands."""
    width = chance.choice((2, 4, 8))
    if len(data) >= width:
        at = chance.randrange(len(data) - width + 1)
        number = chance.choice(_TELLING) % 256**width
        data[at : at + width] = number.to_bytes(width, "little")


def _cut(data: bytearray, chance: random.Random, corpus: Sequence[bytes]) -> None:
    if data:
        at = chance.randrange(len(data))
        del data[at : at + chance.choice((1, 4, 8, 16, len(data)))]


def _grow(data: bytearray, chance: random.Random, corpus: Sequence[bytes]) -> None:
    at, count = chance.choice((len(data), chance.randint(0, len(data)))), chance.choice((1, 2, 4, 8, 16, 32, 64))
    data[at:at] = bytes(count) if chance.random() < 0.7 else chance.randbytes(count)


def _double(data: bytearray, chance: random.Random, corpus: Sequence[bytes]) -> None:
    if data:
        at = chance.randrange(len(data))
        piece = data[at : at + chance.choice((4, 8, 16, 40))]
        to = chance.randint(0, len(data))
        data[to:to] = piece


def _splice(data: bytearray, chance: random.Random, corpus: Sequence[bytes]) -> None:
    other = chance.choice(corpus)
    at, begin = chance.randint(0, len(data)), chance.randint(0, len(other))
    data[at:] = other[begin:]


_WAYS = (_flip, _set, _add, _tell, _tell, _cut, _grow, _double, _splice)
