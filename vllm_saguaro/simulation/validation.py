"""Predicted against measured: our own reports, the paper's table, and the logs of its reproductions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vllm_saguaro.simulation import published
from vllm_saguaro.simulation.plan import Plan
from vllm_saguaro.simulation.published import Published
from vllm_saguaro.simulation.reports import plan_of, read_report, world_of
from vllm_saguaro.simulation.simulation import simulate
from vllm_saguaro.simulation.world import World, reach_of

LIMIT: Final = 0.10
"""A prediction further off than this is said to be."""


@dataclass(frozen=True)
class Line:
    """One number: tokens a second as measured (or published) and as predicted.

    `given` is where the inputs come from, where lines of one table differ in that.
    """

    table: str
    name: str
    measured: float
    predicted: float
    given: str = ""

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1

    @property
    def holds(self) -> bool:
        """Whether it is within the limit."""
        return abs(self.error) <= LIMIT

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        return {**asdict(self), "error": self.error, "holds": self.holds}


def own_lines(paths: Iterable[Path]) -> Iterator[Line]:
    """Saguaro in our reports, twice where it can be: from the engine's own pass times, and from the smallest K's.

    Raises WorldError for a file that is no report.
    """
    for path in paths:
        for bench in read_report(path):
            first = min(bench.ours, key=lambda measured: measured.k)
            for measured in bench.ours:
                plan = plan_of(measured)
                for told in [measured] if measured is first else [measured, first]:
                    found = simulate(world_of(bench, told), plan)
                    yield Line(
                        bench.name,
                        measured.label,
                        measured.tokens_per_second,
                        found.tokens_per_second,
                        "its own times" if told is measured else f"the times of K={first.k}",
                    )


def paper_lines() -> Iterator[Line]:
    """SSD in the paper's table, dataset by dataset, from its AR and SD columns."""
    for line in published.PAPER:
        found = simulate(published.paper_world(line), _published_plan(line))
        yield Line("paper, appendix B.3", f"{line.world} {line.name}", line.ssd, found.tokens_per_second)


def reproduction_lines() -> Iterator[Line]:
    """The two reproductions: by engine, by batch and by K."""
    llama = published.LLAMA_70B
    poc = Plan("ssd", k=published.LLAMA_K, branches=24, requests=40, tokens=512)
    sd_reach = reach_of(published.acceptance_from_tokens(5.03, published.SD_K), published.DEEPEST)
    one = "Llama 70B / 1B by engine"
    yield Line(one, "AR", 66.7, simulate(llama, poc.replace(engine="plain")).tokens_per_second)
    sd = simulate(llama.replace(reach=sd_reach), poc.replace(engine="sd", k=published.SD_K))
    yield Line(one, "SD K=6", 181.7, sd.tokens_per_second)
    yield Line(one, "SSD K=7", 279.8, simulate(llama, poc).tokens_per_second)
    for batch, measured in published.POC_BY_BATCH:
        found = simulate(llama, poc.replace(batch=batch, requests=40 * batch, tokens=256, most_rows=0))
        yield Line("Llama 70B / 1B by batch", f"SSD K=7, batch {batch}", measured, found.tokens_per_second)
    qwen = _qwen_of_wl()
    for k, measured in published.WL_BY_K:
        found = simulate(qwen, poc.replace(k=k))
        yield Line("Qwen 32B / 0.6B by K", f"SSD K={k}", measured, found.tokens_per_second)


def _qwen_of_wl() -> World:
    """Acceptance from the speed of SD with K = 6, 141.4 tokens a second."""
    world = published.QWEN_32B
    seconds = world.target_pass.at(published.SD_K + 1) + world.serial_drafting(published.SD_K)
    chance = published.acceptance_from_tokens(141.4 * seconds, published.SD_K)
    return world.replace(reach=reach_of(chance, published.DEEPEST))


def _published_plan(line: Published) -> Plan:
    return Plan("ssd", k=line.ssd_k, branches=24, batch=line.batch, requests=40 * line.batch, tokens=512)


def as_markdown(lines: Sequence[Line]) -> str:
    """A table for each part; docs/simulate.md has them as they come."""
    parts = []
    for table in dict.fromkeys(line.table for line in lines):
        own = [line for line in lines if line.table == table]
        given = any(line.given for line in own)
        rows = [
            f"| {table} | measured | predicted | off |" + (" fed with |" if given else ""),
            "|---|---|---|---|" + ("---|" if given else ""),
        ]
        for line in own:
            off = f"{line.error:+.1%}" if line.holds else f"**{line.error:+.1%}**"
            row = f"| {line.name} | {_speed(line.measured)} | {_speed(line.predicted)} | {off} |"
            rows.append(row + (f" {line.given} |" if given else ""))
        parts.append("\n".join(rows))
    parts.append(summary(lines))
    return "\n\n".join(parts)


def summary(lines: Sequence[Line]) -> str:
    """How many hold."""
    if not lines:
        return "Nothing to compare."
    held = sum(line.holds for line in lines)
    worst = max(lines, key=lambda line: abs(line.error))
    return (
        f"{held} of {len(lines)} within {LIMIT:.0%}; the worst is {worst.error:+.1%} "
        f"({worst.table}, {worst.name}). Tokens a second."
    )


def _speed(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
