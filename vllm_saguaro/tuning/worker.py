"""One engine in its own process, started as `vllm serve` would start it, and watched while it serves.

    python -m vllm_saguaro.tuning.worker

The orders are those of `benchmark/worker.py`; the first one says in `target`, `words` and `llm.speculative_config` what
to start, and in `watched` whether a saguaro engine's own measurements are wanted with each answer.
"""

from __future__ import annotations

from typing import Any

from vllm_saguaro.benchmark.worker import Worker, main


class TuningWorker(Worker):
    """An engine with the options of a server."""

    def __init__(self, order: dict[str, Any]) -> None:
        super().__init__(order)
        self._probe: Any = None
        if order["watched"]:
            from vllm_saguaro.vllm_hooks.tuning_probe import TuningProbe

            self._probe = TuningProbe.of(self.llm)

    def load(self, order: dict[str, Any]) -> Any:
        """Parse the words as `vllm serve` does; the speculative config is that of the order."""
        from vllm_saguaro.vllm_hooks.served_engine import load_served

        return load_served(order["target"], order["words"], order["llm"]["speculative_config"])

    def run(self, batch: int, temperature: float, top_p: float, prompts: int, tokens: int) -> dict[str, Any]:
        """One repetition, with `observations` where the engine is watched."""
        if self._probe is not None:
            self._probe.take()  # what the warm-up showed
        found = super().run(batch, temperature, top_p, prompts, tokens)
        return {**found, "observations": self._probe.take().to_json() if self._probe is not None else None}


if __name__ == "__main__":
    main(TuningWorker)
