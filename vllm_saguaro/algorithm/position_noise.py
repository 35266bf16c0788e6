"""The noise of vLLM's Model Runner V2: a function of the request's seed, the position and the token.

V2 takes argmax_t (z_t / T + g_t) as the CPU's sampler does (`noise.py`), and its Gumbel noise is a hash (MurmurHash3 of
32 bits, Appleby, public domain) over the seed, the position of the token that was fed, and t: `gumbel_noised_argmax` in
vLLM 0.32, v1/worker/gpu/sample/gumbel.py. Every request has a seed there, its own or a random one, so whoever knows it
knows all noise of the request beforehand.

The hash of seed and position, into which the tokens are mixed one by one, is called the stem of that position here. A
stem is an integer of 32 bits. Text position i, the token number i of a text from 0, is drawn at position i - 1.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", int, Tensor)

_MASK = 2**32 - 1
_FIRST, _SECOND = 0xCC9E2D51, 0x1B873593
_ADDED = 0xE6546B64
_WORDS_IN_BYTES = 16  # four words are hashed
_FINAL_FIRST, _FINAL_SECOND = 0x85EBCA6B, 0xC2B2AE35


def stems(seeds: Tensor, positions: Tensor) -> Tensor:
    """The stems [R] int64, in 0 .. 2^32 - 1, of the text positions [R] int64 for the seeds [R] int64. Static."""
    return _stem(torch.zeros_like(seeds), seeds, positions)


def stem_of(seed: int, position: int) -> int:
    """The stem of one text position, in Python's integers. `seed`: 64 bits, signed or not."""
    return _stem(0, seed, position)


class PositionStems:
    """The stems of one request: number i is that of the text position `prompt_length + i`. Nothing is kept."""

    def __init__(self, seed: int, prompt_length: int) -> None:
        self._seed, self._prompt_length = seed, prompt_length

    def at(self, index: int) -> int:
        """Stem number `index`: in 0 .. 2^32 - 1."""
        return stem_of(self._seed, self._prompt_length + index)

    def forget(self, before: int) -> None:
        """Nothing is kept."""


def gumbel(stem: Tensor, tokens: Tensor) -> Tensor:
    """g [R, M] float64: the noise of the tokens [R, M] int64 at the positions with the stems [R] int64. Static.

    With h the hash of 32 bits:  u = (h + 1/2) 2^-32,  g = -log(-log(1 - u)). vLLM computes it in float32.
    """
    h = _mixed(stem.unsqueeze(-1), tokens & _MASK) ^ _WORDS_IN_BYTES
    h = (h ^ (h >> 16)) * _FINAL_FIRST & _MASK
    h = (h ^ (h >> 13)) * _FINAL_SECOND & _MASK
    h = h ^ (h >> 16)
    u = (h.to(torch.float64) + 0.5) * 2.0**-32
    return torch.log1p(u.neg_()).neg_().log_().neg_()


def gumbel_of_all(stem: Tensor, vocabulary: int) -> Tensor:
    """g [R, V] float64: the noise of every token of the vocabulary."""
    return gumbel(stem, torch.arange(vocabulary, device=stem.device).unsqueeze(0))


def add_noise(logits: Tensor, temperature: Tensor, stem: Tensor, noisy: Tensor) -> None:
    """logits <- logits / T + g in place, in the rows that are `noisy`; the others are left alone. Static.

    logits [R, V] float32, temperature [R] float32, stem [R] int64, noisy [R] bool.
    """
    raced = logits / temperature.unsqueeze(-1) + gumbel_of_all(stem, logits.shape[-1]).float()
    logits.copy_(torch.where(noisy.unsqueeze(-1), raced, logits))


def _stem(h: T, seed: T, position: T) -> T:
    for word in (seed & _MASK, (seed >> 32) & _MASK, (position - 1) & _MASK):
        h = _mixed(h, word)
    return h


def _mixed(h: T, word: T) -> T:
    """One round of MurmurHash3 over integers of 32 bits. In int64 products wrap, and their low 32 bits are right."""
    word = _rotated(word * _FIRST & _MASK, 15) * _SECOND & _MASK
    return (_rotated(h ^ word, 13) * 5 + _ADDED) & _MASK


def _rotated(word: T, count: int) -> T:
    return (word << count | word >> (32 - count)) & _MASK
