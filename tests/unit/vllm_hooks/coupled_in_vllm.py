"""What `test_coupled_sampler.py` asks of vLLM's V2 kernels: one JSON object, the last line of the output."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.v2 import interpreted

V, K = 50, 3
TEMPERATURES = [0.0, 1.0, 0.7, 1.3, 1.0]
FED = [("all",), ("right", "right", "wrong"), ("wrong", "right"), ("right", "marked", "right"), ()]
"""The drafts of each request; "all": K right ones."""


def main() -> None:
    interpreted.install()
    import torch
    import vllm.v1.worker.cpu.shm  # noqa: F401  stand-ins for CUDA first: vLLM's modules bind them
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    from vllm_saguaro.algorithm import position_noise
    from vllm_saguaro.vllm_hooks import coupled_sampler

    cpu, single = torch.device("cpu"), SimpleNamespace(use_fp64_gumbel=False)
    answer: dict[str, Any] = {
        "known": coupled_sampler.noise_is_known(single, cpu),
        "double precision": coupled_sampler.noise_is_known(SimpleNamespace(use_fp64_gumbel=True), cpu),
    }
    with mock.patch.object(coupled_sampler, "stems", lambda seeds, at: position_noise.stems(seeds, at + 1)):
        answer["another position"] = coupled_sampler.noise_is_known(single, cpu)
    with mock.patch.object(RejectionSampler, "_verify", RejectionSampler.__call__):
        answer["other parameters"] = coupled_sampler.noise_is_known(single, cpu)
    with mock.patch.object(coupled_sampler, "gumbel_sample", lambda logits: logits.argmax(-1)):
        answer["another call"] = coupled_sampler.noise_is_known(single, cpu)

    torch.manual_seed(0)
    kinds = [("right",) * K if fed == ("all",) else fed for fed in FED]
    rows = [(request, place) for request, fed in enumerate(kinds) for place in range(len(fed) + 1)]
    slots = torch.tensor([request for request, _ in rows], dtype=torch.int32)
    positions = torch.tensor([10 + 3 * request + place for request, place in rows])
    temperature = torch.tensor(TEMPERATURES)
    seeds = torch.tensor([11, -5, 2**40, 7, 0])
    logits = torch.randn(len(rows), V)
    scaled = logits / torch.where(temperature == 0, 1.0, temperature)[slots.long()].unsqueeze(1)
    plain = gumbel_sample(scaled, slots, temperature, seeds, positions, apply_temperature=False, is_drafting=False)
    fed = torch.full((len(rows),), 99)
    for row, (request, place) in enumerate(rows):
        if place:
            kind, right = kinds[request][place - 1], int(plain[row - 1])
            fed[row] = {"right": right, "wrong": (right + 1) % V, "marked": -1}[kind]
    states = SimpleNamespace(temperature=SimpleNamespace(gpu=temperature), seeds=SimpleNamespace(gpu=seeds))
    own: Any = RejectionSampler.__new__(RejectionSampler)
    own.sampler = SimpleNamespace(
        sampling_states=states, use_fp64_gumbel=False, apply_sampling_params=lambda *_: scaled
    )
    own.num_speculative_steps = K
    begins = torch.tensor([0, *(sum(len(f) + 1 for f in kinds[: r + 1]) for r in range(len(kinds)))])
    places = torch.tensor([place for _, place in rows], dtype=torch.int32)
    nothing: Any = None
    _, tokens, counts = coupled_sampler.CoupledSampler.of(own)._verify(
        *(logits, None, fed, positions, begins.int(), nothing, nothing, slots, places, nothing, fed)
    )
    answer["counts"] = counts.tolist()
    answer["drawn"] = [row[:count] for row, count in zip(tokens.tolist(), answer["counts"], strict=True)]
    answer["plain"] = [
        plain[begin : begin + count].tolist() for begin, count in zip(begins.tolist(), answer["counts"], strict=False)
    ]
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
