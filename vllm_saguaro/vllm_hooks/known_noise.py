"""Noise that is known beforehand in vLLM's CPU sampler (0.32, `v1/sample/ops/topk_topp_sampler.py`, `forward_cpu`).

vLLM draws an integer for each row and takes argmax_t (z_t + g_t) with noise g that depends on the integer and on t.
Here rows may bring their integer along; for all others it is drawn as vLLM draws it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p

from vllm_saguaro.algorithm.noise import key_seed
from vllm_saguaro.messages import GREEDY_BELOW, Noise


class RequestKeys:
    """A key for each request that samples and has no seed: its noise is then known, to both sides, and to nobody else.

    The keys are as random as vLLM's own numbers are: made from the engine's seed, one after the other.
    """

    def __init__(self, seed: int, known: bool, keyed: bool) -> None:
        """`known`: whether one integer decides a token in this engine (else no noise is known). `keyed`: whether
        requests without a seed get a key."""
        self._random = np.random.default_rng(seed % 2**64)
        self._known, self._keyed = known, keyed
        self._keys: dict[str, int] = {}

    def noise_of(self, request_id: str, params: SamplingParams) -> tuple[Noise, int]:
        """Where the noise of a request comes from, and its seed or key as a signed 64-bit integer."""
        if not self._known or params.temperature < GREEDY_BELOW:
            return Noise.UNKNOWN, 0
        if params.seed is not None:
            return Noise.SEED, _signed(params.seed)
        if not self._keyed:
            return Noise.UNKNOWN, 0
        if request_id not in self._keys:
            self._keys[request_id] = int(self._random.integers(-(2**63), 2**63))
        return Noise.KEY, self._keys[request_id]

    def integers(self, request_id: str, index: int, count: int) -> list[int]:
        """The integers of output tokens `index` .. `index + count - 1` of a request; none where it has no key."""
        key = self._keys.get(request_id)
        return [] if key is None else [key_seed(key, index + i) for i in range(count)]

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._keys.pop(request_id, None)


def _signed(seed: int) -> int:
    """The same 64 bits as a signed integer: a generator takes both for the same seed."""
    return (seed + 2**63) % 2**64 - 2**63


class KnownNoise:
    """Stands in for `forward` of one `TopKTopPSampler`."""

    def __init__(self, sampler: TopKTopPSampler) -> None:
        self._original = sampler.forward
        self._logprobs_mode = sampler.logprobs_mode
        self._integers: Mapping[int, int] = {}

    @staticmethod
    def possible(sampler: Any) -> bool:
        """Whether one integer decides a token there: not with other processors, nor with noise in double precision."""
        return sampler.forward == sampler.forward_cpu and not sampler.use_fp64_gumbel

    @contextmanager
    def given(self, integers: Mapping[int, int]) -> Iterator[None]:
        """Inside, row r of the logits is drawn with `integers[r]`."""
        before, self._integers = self._integers, integers
        try:
            yield
        finally:
            self._integers = before

    def __call__(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens [B] int64 of logits [B, V], and the processed logits or log-probabilities if they are asked for."""
        if not self._integers:
            return self._original(logits, generators, k, p)
        logits = apply_top_k_top_p(logits, k, p)
        processed = None
        if self._logprobs_mode == "processed_logits":
            processed = logits
        elif self._logprobs_mode == "processed_logprobs":
            processed = logits.log_softmax(dim=-1, dtype=torch.float32)
        seeds = torch.randint(0, 2**31, (logits.shape[0],), dtype=torch.long)
        for row, generator in generators.items():
            seeds[row] = torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        rows = list(self._integers)
        seeds[rows] = torch.tensor([self._integers[row] for row in rows], dtype=torch.long)
        return torch.ops._C.fused_gumbel_argmax(logits.float(), seeds), processed
