"""A vLLM engine that itself lives in a Ray actor: `python -m tests.e2e.in_ray ADDRESS`, with the options on standard
input. Standard output: one line of JSON with the texts, hits, and what is left of the engine's in the cluster."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from tests.e2e.harness import ENVIRONMENT, ROOT, Json


class Engine:
    """An `LLM` in the process of a Ray actor."""

    def run(self, spec: Json) -> Json:
        os.environ.update(ENVIRONMENT)
        from vllm import LLM, SamplingParams

        llm = LLM(**spec["options"])
        params = SamplingParams(temperature=0.0, **spec["params"])
        outputs = llm.generate(spec["prompts"], params, use_tqdm=False)
        hits = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:saguaro_hits"]
        llm.llm_engine.engine_core.shutdown()
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "hits": hits[0]}


def main() -> None:
    import ray
    from ray.util import placement_group_table

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec: Json = json.load(sys.stdin)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    ray.init(sys.argv[1], runtime_env={"env_vars": environment}, log_to_driver=True)
    engine: Any = ray.remote(num_cpus=1, resources={"head": 1})(Engine).remote()
    answer = ray.get(engine.run.remote(spec))
    answer["groups"] = [group["state"] for group in placement_group_table().values() if group["state"] != "REMOVED"]
    answers.write(json.dumps(answer) + "\n")
    answers.close()


if __name__ == "__main__":
    main()
