"""The check itself: one section after the other; what fails is noted, and the next one goes on."""

from __future__ import annotations

import contextlib
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scripts.gpu_checking import judgement
from scripts.gpu_checking.cells import rate
from scripts.gpu_checking.child import Child, ChildError
from scripts.gpu_checking.goals import goals
from scripts.gpu_checking.settings import Settings
from scripts.gpu_checking.shapes import PAIRS, default_source, write_folder
from scripts.gpu_checking.widened import write_plugin
from vllm_saguaro.benchmark import provenance
from vllm_saguaro.benchmark.settings import allowed_cores

Json = dict[str, Any]
Say = Callable[[str], None]

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_ON_CPU = {"TRITON_INTERPRET": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

_LEAST = 5.0
"""Seconds that must be left for another order to be begun."""
_BETWEEN = 5.0
"""Seconds between two engines: one ends, the other begins."""


@dataclass(slots=True)
class Section:
    """What came of one of the things to show. `answer` holds the numbers, as the engine gave them.

    `of`: the order that it answers, with its pair and its engine (`mode`); empty where it is none of an engine.
    """

    name: str
    complaints: list[str] = field(default_factory=list)
    brief: str = ""
    seconds: float = 0.0
    answer: Json = field(default_factory=dict)
    of: Json = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether it was shown."""
        return not self.complaints


class Session:
    """One run. Each finished section is told to `say` in one line, and kept in `sections`."""

    def __init__(self, settings: Settings, folder: Path, say: Say) -> None:
        """`folder`: for logs, the profiler's trace and the models' configurations."""
        settings.check()
        self.settings, self.folder, self.sections = settings, folder, list[Section]()
        self._say, self._end = say, time.monotonic() + settings.budget
        self._plugins = folder / "plugins"
        self._environment = _ENVIRONMENT | (_ON_CPU if settings.on_cpu else {}) | {"PYTHONPATH": str(self._plugins)}
        self._answers: dict[tuple[str, str], Json] = {}

    def run(self) -> Json:
        """Everything; the report, ready for JSON."""
        about = provenance.collect(allowed_cores()) | {"gpu": gpu_state(), "host": platform.machine()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_plugin(self._plugins)
        self._kernels()
        for pair in (self.settings.pair, *self.settings.also):
            self._pair(pair)
        shutil.rmtree(self._plugins, ignore_errors=True)
        kept = goals([asdict(section) for section in self.sections], self.settings.to_json())
        with self._section("goals") as section:
            section.complaints, section.brief = judgement.goals(kept)
        return {
            "provenance": about,
            "settings": self.settings.to_json(),
            "passed": all(section.passed for section in self.sections),
            "goals": kept,
            "sections": [asdict(section) for section in self.sections],
        }

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def _left(self) -> float:
        """Seconds; raises ChildError where there are too few to begin anything."""
        left = self._end - time.monotonic()
        if left < _LEAST:
            raise ChildError(f"left out: the budget of {self.settings.budget:.0f} s is spent")
        return left

    @contextlib.contextmanager
    def _section(self, name: str) -> Iterator[Section]:
        """A section around a block; an exception in it is the section's complaint, and goes no further."""
        section, begin = Section(name), time.monotonic()
        try:
            yield section
        except Exception as error:
            section.complaints.append(_one_line(error))
        section.seconds = round(time.monotonic() - begin, 1)
        self.sections.append(section)
        result = "ok    " if section.passed else "FAILED"
        what = section.brief if section.passed else section.complaints[0]
        self._say(f"{result} {section.seconds:6.1f} s  {name:34} {what[:600]}")

    def _kernels(self) -> None:
        settings = self.settings
        arguments = [settings.device, str(settings.kernel_seeds)]
        with self._section("kernels") as section:
            log = self.folder / "kernels.log"
            with Child("scripts.gpu_checking.kernels", arguments, self._environment, log) as child:
                section.answer = child.ask(None, min(self._left, settings.budget / 4))
            section.complaints += section.answer["disagreements"]
            times = section.answer["microseconds"].items()
            section.brief = f"{section.answer['cases']} cases equal" + "".join(f", {n} {t} us" for n, t in times)

    # ---- one pair ----------------------------------------------------------------------------------------------------

    def _pair(self, pair: str) -> None:
        """Everything with the first pair; with another one its speeds, where they fit into what is left."""
        settings, first = self.settings, pair == self.settings.pair
        with self._section("models" if first else f"{pair}: models") as section:
            if not first and (left := self._end - time.monotonic()) < (needed := self._needed(pair)):
                raise ChildError(f"left out: it may need {needed:.0f} s, and {left:.0f} are left; give --pair {pair}")
            shapes, folder = PAIRS[pair], self.folder / pair.replace("/", "-")
            target = write_folder(default_source("target"), shapes.target, folder / "target")
            draft = write_folder(default_source("draft"), shapes.draft, folder / "draft")
            section.brief = f"{pair}: {shapes.target.layers} and {shapes.draft.layers} layers"
        if not section.passed:
            return
        for mode in settings.modes if first else settings.modes_also:
            self._engine(pair, mode, target, draft)
        if first:
            for mode in settings.modes:
                if mode != "plain":
                    self._compare(mode)
        shutil.rmtree(folder, ignore_errors=True)

    def _needed(self, pair: str) -> float:
        """Seconds that the engines of another pair may take, by what those of the first one did.

        A pass takes as long as its weights take to read; of a start most is not the weights.
        """
        settings = self.settings
        ratio = max(1.0, PAIRS[pair].target.parameters / PAIRS[settings.pair].target.parameters)
        seconds = _BETWEEN * len(settings.modes_also)
        for section in self.sections:
            if section.of.get("mode") not in settings.modes_also:
                continue
            if section.of["order"] == "start":
                seconds += 1.2 * section.seconds
            elif section.of["order"] in ("speed", "hit") and section.of["batch"] in settings.few_batches:
                seconds += ratio * section.seconds
        return seconds

    def _engine(self, pair: str, mode: str, target: Path, draft: Path) -> None:
        """All orders of one engine; one that dies is started anew once, for the orders after the one it died of."""
        first = pair == self.settings.pair
        waiting = self.settings.orders(mode, self.folder) if first else self.settings.orders_also(mode)
        load = self.settings.load_order(mode, target, draft, pair)
        name = mode if first else f"{pair} {mode}"
        log = self.folder / f"{name.replace('/', '-').replace(' ', '-')}.log"
        for _ in range(2):
            with Child("scripts.gpu_checking.engine", [], self._environment, log) as child:
                with self._section(f"{name}: start") as section:
                    section.of = {"pair": pair, "mode": mode, "order": "start"}
                    section.answer = _answer(child.ask(load, self._left))
                    section.complaints += judgement.started(section.answer)
                    section.brief = f"{section.answer['start_seconds']} s, {section.answer['kv_blocks']} blocks of KV"
                while waiting and child.alive and section.passed:
                    order = waiting.pop(0)
                    self._order(_title(name, order), {"pair": pair, "mode": mode} | order, child)
            if not waiting or not section.passed:
                break
        for order in waiting:
            self.sections.append(Section(_title(name, order), [f"left out: {name} was not there"]))

    def _order(self, title: str, of: Json, child: Child) -> None:
        order = {name: value for name, value in of.items() if name not in ("pair", "mode", "warm_up")}
        mode, kind = of["mode"], of["order"]
        with self._section(title) as section:
            section.of = {name: value for name, value in of.items() if name != "trace"}  # of this machine alone
            answer = section.answer = _answer(child.ask(order, self._left))
            if of["pair"] == self.settings.pair:
                self._answers[mode, kind] = answer
            if of.get("warm_up"):
                return
            if kind == "speed":
                section.complaints += judgement.speed(answer, mode)
                section.brief = f"{rate(answer) or 0:.0f} tokens/s"
            elif kind in judgement.ALONE:
                section.complaints += judgement.ALONE[kind](answer)
                section.brief = ", ".join(f"{name} {value}" for name, value in answer.items())

    def _compare(self, mode: str) -> None:
        """Greedy texts and samples against plain vLLM's."""
        with self._section(f"{mode}: greedy texts are plain's") as section:
            plain, other = self._both("texts", mode)
            section.complaints, section.brief = judgement.texts(plain, other, self.settings.tie)
        if any(order["order"] == "samples" for order in self.settings.orders(mode, self.folder)):
            with self._section(f"{mode}: samples are plain's") as section:
                section.complaints, section.brief = judgement.samples(*self._both("samples", mode))

    def _both(self, kind: str, mode: str) -> tuple[Json, Json]:
        for each in ("plain", mode):
            if (each, kind) not in self._answers:
                raise ChildError(f"{each} gave no {kind}")
        return self._answers["plain", kind], self._answers[mode, kind]


def gpu_state() -> list[str] | None:
    """Name, driver, memory and clocks of each GPU; None where there is none."""
    query = "name,driver_version,memory.total,memory.used,clocks.sm,power.limit"
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip().splitlines()


def _answer(answer: Json) -> Json:
    if "error" in answer:
        raise ChildError(_end_of(answer["error"]))
    return answer


def _end_of(traceback: str, lines: int = 4) -> str:
    """The last lines of a traceback in one, the error first."""
    *before, error = [line.strip() for line in traceback.strip().splitlines()][-lines:]
    return " | ".join([error, *before])


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()) if not isinstance(error, ChildError) else str(error)


def _title(name: str, order: Json) -> str:
    """Of an order to the engine `name`."""
    if order["order"] == "speed":
        warm = " (warm-up)" if order.get("warm_up") else ""
        return f"{name}: batch {order['batch']}, T = {order['temperature']:g}{warm}"
    return f"{name}: hit at batch {order['batch']}" if order["order"] == "hit" else f"{name}: {order['order']}"
