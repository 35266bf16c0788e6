"""Texts from prompts, without a server, and how often their drafts were there in time.

python examples/offline.py                                        the pair of this repository
python examples/offline.py --model MODEL --draft DRAFT --temperature 0.7
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PAIR = Path(__file__).resolve().parents[1] / "assets" / "pair" / "target"
PROMPTS = ("def read_lines(path):\n", "class Queue:\n", "import os\n\n\ndef ")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("prompts", nargs="*", default=list(PROMPTS), help="(default: three beginnings of Python files)")
    found.add_argument("--model", default=str(PAIR), help="the target (default: the pair of this repository)")
    found.add_argument("--draft", help="the draft (default: chosen by the plugin)")
    found.add_argument("--temperature", type=float, default=0.0, help="(default: 0, greedy)")
    found.add_argument("--max-tokens", type=int, default=64, help="of each text (default: 64)")
    found.add_argument("--kv-cache-bytes", type=int, default=1 << 30, help="of the target (default: 1 GiB)")
    return found


def speculative_config(draft: str | None) -> dict[str, Any]:
    """The method, and the draft where one is named. All else chooses itself: docs/options.md."""
    return {"method": "saguaro"} | ({"model": draft} if draft else {})


def main() -> None:
    """Generate, then read the plugin's counters."""
    arguments = parser().parse_args()
    from vllm import LLM, SamplingParams  # after the command line: importing vLLM takes seconds

    llm = LLM(
        model=arguments.model,
        speculative_config=speculative_config(arguments.draft),
        kv_cache_memory_bytes=arguments.kv_cache_bytes,
        disable_log_stats=False,  # else there are no metrics to read
    )
    sampling = SamplingParams(temperature=arguments.temperature, max_tokens=arguments.max_tokens)
    for output in llm.generate(arguments.prompts, sampling):
        print(f"--- {output.prompt!r}\n{output.outputs[0].text}\n")
    counted: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            counted[metric.name] = counted.get(metric.name, 0) + metric.value
    hits, misses = counted["vllm:saguaro_hits"], counted["vllm:saguaro_misses"]
    print(f"{hits:.0f} of {hits + misses:.0f} outcomes had been predicted, and their drafts were there")


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
