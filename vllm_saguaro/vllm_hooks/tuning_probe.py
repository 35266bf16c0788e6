"""Looks over the shoulder of a saguaro engine in this process (model runner V1) while it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_saguaro.messages import Miss
from vllm_saguaro.policy import Judged, Policy, Source
from vllm_saguaro.speculator import Speculator
from vllm_saguaro.tuning.observations import Observations
from vllm_saguaro.turn import Turn, Verified
from vllm_saguaro.vllm_hooks.benchmark_probes import runner_of


class TuningProbe:
    """Notes what the target side sees of passes, tables, outcomes and drafts, and hands everything on untouched."""

    def __init__(self, speculator: Speculator) -> None:
        self._found = Observations()
        self._rows = 0
        policy: Policy = speculator.policy
        self._observe_step, self._observe_drafts = policy.observe_step, policy.observe_drafts
        self._observe_round = policy.observe_round
        self._measure, self._look_up, self._miss = speculator._measure, speculator._look_up, speculator._miss
        # The backups hold the same policy: what is put on the object reaches all who ask it.
        for name, mine in (
            ("observe_step", self._step),
            ("observe_drafts", self._judged),
            ("observe_round", self._table),
        ):
            setattr(policy, name, mine)
        for name, look in (("_measure", self._measured), ("_look_up", self._looked_up), ("_miss", self._missed)):
            setattr(speculator, name, look)

    @classmethod
    def of(cls, llm: Any) -> TuningProbe:
        """Of the engine of an `LLM` in this process."""
        return cls(runner_of(llm).drafter.speculator)

    def take(self) -> Observations:
        """What was seen since the last time."""
        found, self._found = self._found, Observations()
        return found

    def _measured(self, rows: Sequence[Verified], tokens_in: int | None, known_at: float) -> None:
        self._rows = len(rows)
        self._measure(rows, tokens_in, known_at)

    def _step(self, rows: int, drafts: int | None, drawn: int, tokens_out: int, seconds: float, whole: float) -> None:
        if drafts is not None:
            self._found.add_pass(rows, rows + drafts, seconds)
        self._observe_step(rows, drafts, drawn, tokens_out, seconds, whole)

    def _judged(self, judged: Sequence[Judged]) -> None:
        for row in judged:
            if row.source is Source.CACHE:
                self._found.add_drafts(row.verified, row.accepted)
        self._observe_drafts(judged)

    def _table(self, depth: int, seconds: float) -> None:
        if self._rows:
            self._found.add_table(self._rows, depth, seconds)
        self._observe_round(depth, seconds)

    def _looked_up(self, row: Verified) -> Turn:
        turn = self._look_up(row)
        if turn.drawn is not None:
            self._found.ranks[turn.drawn.branch] += 1  # the branches of a table are in the order of their likelihood
        return turn

    def _missed(self, turn: Turn, cause: Miss) -> Turn:
        self._found.not_predicted += cause is Miss.NOT_PREDICTED
        return self._miss(turn, cause)
