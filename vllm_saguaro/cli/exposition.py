"""A server's `/metrics`: Prometheus' text format as numbers with labels."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

_SAMPLE: Final = re.compile(r'(?P<name>[^\s{]+)(?:\{(?P<labels>(?:[^"}]|"(?:[^"\\]|\\.)*")*)\})?\s+(?P<value>\S+)')
_LABEL: Final = re.compile(r'(?P<name>[\w:]+)="(?P<value>(?:[^"\\]|\\.)*)"')
_ESCAPED: Final = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: a number under a name and labels."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples(text: str) -> Iterator[Sample]:
    """Every line that is a sample; comments, what is none, and what is no finite number are left out."""
    for line in text.splitlines():
        match = None if line.startswith("#") else _SAMPLE.match(line)
        if match is None:
            continue
        try:
            value = float(match["value"])
        except ValueError:
            continue
        if not math.isfinite(value):
            continue
        labels = {label["name"]: _plain(label["value"]) for label in _LABEL.finditer(match["labels"] or "")}
        yield Sample(match["name"], labels, value)


class Snapshot:
    """All samples of one moment, summed over the labels that are not asked for (model, engine)."""

    def __init__(self, source: str | Iterable[Sample]) -> None:
        self._by_name: dict[str, list[Sample]] = {}
        for sample in samples(source) if isinstance(source, str) else source:
            self._by_name.setdefault(sample.name, []).append(sample)

    def __len__(self) -> int:
        """How many names there are: none where nothing was read."""
        return len(self._by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def total(self, name: str) -> float:
        """A number, over all labels; 0 where it is not there."""
        return sum(sample.value for sample in self._by_name.get(name, ()))

    def mean(self, name: str) -> float:
        """A number, averaged over all labels; 0 where it is not there."""
        return self.total(name) / max(1, len(self._by_name.get(name, ())))

    def values(self, name: str, label: str) -> list[str]:
        """The values of one label of a number, sorted; numbers in order of their size."""
        found = {sample.labels[label] for sample in self._by_name.get(name, ()) if label in sample.labels}
        return sorted(found, key=lambda value: (not value.isdecimal(), int(value) if value.isdecimal() else 0, value))

    def where(self, label: str, value: str) -> Snapshot:
        """Only the samples with this value of a label."""
        every = (sample for found in self._by_name.values() for sample in found)
        return Snapshot(sample for sample in every if sample.labels.get(label) == value)

    def by(self, name: str, label: str) -> dict[str, float]:
        """The numbers by the values of one label."""
        found: dict[str, float] = {}
        for sample in self._by_name.get(name, ()):
            key = sample.labels.get(label, "")
            found[key] = found.get(key, 0.0) + sample.value
        return found

    def bins(self, histogram: str) -> dict[float, float]:
        """Counts up to each upper bound, as Prometheus has them."""
        counts = self.by(f"{histogram}_bucket", "le")
        return {(math.inf if bound == "+Inf" else float(bound)): count for bound, count in counts.items()}


def _plain(value: str) -> str:
    r"""A label's value without its escapes: \\, \" and \n."""
    return _ESCAPED.sub(lambda match: "\n" if match[1] == "n" else match[1], value)
