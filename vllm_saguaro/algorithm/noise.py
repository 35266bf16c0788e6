"""The noise that target and draft share.

The target's token at a position is argmax_t (log p_t + g_t) with Gumbel noise g that depends on nothing but the request
and the position: an exact draw from p, whatever was drafted. A draft that takes the arg-max of its own log q with the
same noise agrees with it wherever p and q do not differ by more than the noise does, and knows what it would take
second (Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant speculative decoding").

vLLM's CPU sampler (`TopKTopPSampler.forward_cpu` in vllm/v1/sample/ops/topk_topp_sampler.py) draws one integer per
output token from the request's generator, and takes argmax_t (z_t / T + g_t), where the Gumbel noise g_t is a function
of that integer and of t alone (`fused_gumbel_argmax` in its C++ part). Whoever knows the request's seed knows all of
its noise beforehand. A request without a seed gets a key, and an integer for each position from that.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Integers are drawn this many at a time: a call of the generator costs the same for one.
_PIECE = 64

# The constants of SplitMix64, as the signed integers that torch has: the same bits, and sums and products wrap alike.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def gumbel_of_all(seeds: Tensor, vocabulary: int) -> Tensor:
    """g [R, V] float64: the noise of every token of the vocabulary."""
    return gumbel(seeds, torch.arange(vocabulary, device=seeds.device).unsqueeze(0))


def gumbel(seeds: Tensor, tokens: Tensor) -> Tensor:
    """g [R, M] float64: vLLM's noise of the tokens [R, M] int64, with the integer seeds[r] (int64) for row r.

    With h = splitmix64:  u = ((h(h(seed) + (t + 1) step) >> 11) + 1/2) 2^-53,  g = -log(-log u). Static.
    """
    key = _splitmix64(seeds).unsqueeze(-1)
    bits = _shift_right(_splitmix64(key + (tokens + 1) * _STEP), 11)
    u = (bits.to(torch.float64) + 0.5) * 2.0**-53
    return u.log_().neg_().log_().neg_()


class NoiseSeeds:
    """The integers that one request's generator yields in vLLM, one per output token, in order.

    Made from the request's seed, in the range of `torch.Generator.manual_seed`: -2^63 .. 2^64 - 1 (RuntimeError
    otherwise, as in vLLM). It keeps what lies between the last `forget` and the largest index asked for.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator()
        self._generator.manual_seed(seed)
        self._first = 0
        self._kept: list[int] = []

    def at(self, index: int) -> int:
        """Integer number `index`, from 0: in 0 .. 2^31 - 1. IndexError where it is negative or has been forgotten."""
        if index < self._first:
            raise IndexError(f"noise number {index} is gone: the first that is kept is {self._first}")
        while index >= self._first + len(self._kept):
            self._draw()
        return self._kept[index - self._first]

    def forget(self, before: int) -> None:
        """Give up all numbers below `before`, drawn already or not. Nothing happens where they are gone."""
        while before > self._first + len(self._kept):
            self._first += len(self._kept)
            self._kept.clear()
            self._draw()
        if before > self._first:
            del self._kept[: before - self._first]
            self._first = before

    def _draw(self) -> None:
        piece = torch.randint(0, 2**31, (_PIECE,), generator=self._generator, dtype=torch.int64)
        self._kept.extend(piece.tolist())


class KeySeeds:
    """The integers of a request that has a key instead of a seed: number i is a hash of the key and i."""

    def __init__(self, key: int) -> None:
        self._key = key

    def at(self, index: int) -> int:
        """Integer number `index`, from 0: in 0 .. 2^62 - 1. IndexError where it is negative."""
        if index < 0:
            raise IndexError(f"there is no noise number {index}")
        return key_seed(self._key, index)

    def forget(self, before: int) -> None:
        """Nothing is kept."""


def key_seed(key: int, index: int) -> int:
    """h(key + (index + 1) step) >> 2 with h = splitmix64, in Python's integers: one at a time."""
    z = (key + (index + 1) * (_STEP + 2**64)) % 2**64
    z = ((z ^ (z >> 30)) * (_FIRST + 2**64)) % 2**64
    z = ((z ^ (z >> 27)) * (_SECOND + 2**64)) % 2**64
    return (z ^ (z >> 31)) >> 2


def _splitmix64(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64, modulo 2^64."""
    z = (z ^ _shift_right(z, 30)) * _FIRST
    z = (z ^ _shift_right(z, 27)) * _SECOND
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, count: int) -> Tensor:
    """z >> count with zeros coming in from the left: torch's own shift of a signed integer brings in the sign."""
    return (z >> count) & (2 ** (64 - count) - 1)
