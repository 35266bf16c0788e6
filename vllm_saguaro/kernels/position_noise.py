"""`algorithm.position_noise.add_noise` as a Triton kernel. No GPU has run it yet: it runs interpreted, and compiles."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 1024


def add_noise(logits: Tensor, temperature: Tensor, stem: Tensor, noisy: Tensor) -> None:
    """logits <- logits / T + g in place, in the rows that are `noisy`: see the twin.

    Grid: one program for 1024 tokens of a row. It reads and writes 4 bytes a token.
    """
    rows, vocabulary = logits.shape
    if rows and vocabulary:
        _noise[(rows, triton.cdiv(vocabulary, _TOKENS))](
            logits,
            *logits.stride(),
            temperature,
            temperature.stride(0),
            stem,
            stem.stride(0),
            noisy,
            noisy.stride(0),
            vocabulary,
            BLOCK=_TOKENS,
            num_warps=4,
        )


@triton.jit
def _noise(  # type: ignore[no-untyped-def]
    logits,
    logits_row,
    logits_token,
    temperature,
    temperature_row,
    stem,
    stem_row,
    noisy,
    noisy_row,
    vocabulary,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(noisy + row * noisy_row):
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = token < vocabulary
        at = logits + row * logits_row + token.to(tl.int64) * logits_token
        value = tl.load(at, mask=inside, other=0.0) / tl.load(temperature + row * temperature_row)

        word = token.to(tl.uint32) * 0xCC9E2D51
        word = ((word << 15) | (word >> 17)) * 0x1B873593
        h = tl.load(stem + row * stem_row).to(tl.uint32) ^ word
        h = ((h << 13) | (h >> 19)) * 5 + 0xE6546B64
        h ^= 16
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        h ^= h >> 16
        # In halves, which floats hold exactly
        high, low = (h >> 16).to(tl.int32).to(tl.float32), (h & 0xFFFF).to(tl.int32).to(tl.float32)
        u = high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10
        # The token that wins mostly has a small u, where 1 - u would round it away: log(1 - u) as a series there
        series = -u * (1.0 + u * (0.5 + u * (0.33333333 + u * (0.25 + u * 0.2))))
        direct = tl.log(tl.maximum(1.0 - u, 5.9604644775390625e-08))
        value -= tl.log(-tl.where(u < 0.0625, series, direct))
        tl.store(at, value, mask=inside)
