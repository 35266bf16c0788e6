"""`Step` as bytes: a fixed little-endian layout with magic, version and lengths, and a decoder that trusts nothing.

No pickle crosses between the two sides: any bytes decode to a `Step` or raise `WireError`.
"""

from __future__ import annotations

import array
import math
import struct
import sys

from vllm_saguaro.messages import Admit, Noise, Outcome, Release, Sampling, Stamp, Step, Want

_MAGIC = 0x53474152  # "SGAR"
_VERSION = 2
_NOISES = tuple(Noise)
_HEADER = struct.Struct("<IHHHHH")  # magic, version, admits, wants, outcomes, releases
_STAMP = struct.Struct("<iiq")  # slot, generation, round
_ADMIT = struct.Struct("<iiqfiffBqii")  # stamp, temperature, top_k, top_p, min_p, noise, seed, prompt length, tokens
_WANT = struct.Struct("<iiqiii")  # stamp, accepted, bonus, depth
_OUTCOME = struct.Struct("<iiqiiiii")  # stamp, accepted, bonus, length, verified, number of drafts

if sys.byteorder != "little" or array.array("i").itemsize != 4:  # pragma: no cover
    raise ImportError("vllm_saguaro needs a little-endian machine with 32-bit C integers")


class WireError(ValueError):
    """Bytes that are not a `Step`."""


def encode(step: Step) -> bytes:
    """The bytes of a step.

    Raises `struct.error` for integers beyond 32 bits (64 for the round and the seed), `OverflowError` for a number
    beyond float32.
    """
    counts = len(step.admits), len(step.wants), len(step.outcomes), len(step.releases)
    parts = [_HEADER.pack(_MAGIC, _VERSION, *counts)]
    for admit in step.admits:
        stamp, s = admit.stamp, admit.sampling
        parts.append(
            _ADMIT.pack(
                *(stamp.slot, stamp.generation, stamp.round, s.temperature, s.top_k, s.top_p, s.min_p),
                *(_NOISES.index(s.noise), s.seed, s.prompt_length, len(admit.token_ids)),
            )
        )
        parts.append(array.array("i", admit.token_ids).tobytes())
    for want in step.wants:
        stamp = want.stamp
        parts.append(_WANT.pack(stamp.slot, stamp.generation, stamp.round, want.accepted, want.bonus, want.depth))
    for o in step.outcomes:
        stamp, drafts = o.stamp, o.speculation
        found = stamp.slot, stamp.generation, stamp.round, o.accepted, o.bonus, o.length, o.verified
        parts.append(_OUTCOME.pack(*found, len(drafts)))
        parts.append(array.array("i", drafts).tobytes())
    for release in step.releases:
        stamp = release.stamp
        parts.append(_STAMP.pack(stamp.slot, stamp.generation, stamp.round))
    return b"".join(parts)


def decode(data: bytes) -> Step:
    """The step in `data`. Raises `WireError` for anything that `encode` did not make."""
    try:
        magic, version, admits, wants, outcomes, releases = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, _VERSION):
            raise WireError(f"magic {magic:#x}, version {version}: not a step of version {_VERSION}")
        at = _HEADER.size
        step = Step()
        for _ in range(admits):
            slot, generation, round_, *asked, count = _ADMIT.unpack_from(data, at)
            tokens, at = _integers(data, at + _ADMIT.size, count)
            step.admits.append(Admit(_stamp(slot, generation, round_), _sampling(*asked), tokens))
        for _ in range(wants):
            slot, generation, round_, accepted, bonus, depth = _WANT.unpack_from(data, at)
            at += _WANT.size
            if min(accepted, bonus, depth) < 0:
                raise WireError("a want with a negative count")
            step.wants.append(Want(_stamp(slot, generation, round_), accepted, bonus, depth))
        for _ in range(outcomes):
            slot, generation, round_, accepted, bonus, length, verified, count = _OUTCOME.unpack_from(data, at)
            drafts, at = _integers(data, at + _OUTCOME.size, count)
            if min(accepted, bonus, length) < 0 or verified < accepted:
                raise WireError("an outcome with a negative count")
            step.outcomes.append(Outcome(_stamp(slot, generation, round_), accepted, bonus, length, drafts, verified))
        for _ in range(releases):
            slot, generation, round_ = _STAMP.unpack_from(data, at)
            at += _STAMP.size
            step.releases.append(Release(_stamp(slot, generation, round_)))
    except struct.error as error:
        raise WireError(str(error)) from None
    if at != len(data):
        raise WireError(f"{len(data) - at} bytes too many")
    return step


def _stamp(slot: int, generation: int, round_: int) -> Stamp:
    if slot < 0 or generation < 0 or round_ < 0:
        raise WireError("a stamp with a negative part")
    return Stamp(slot, generation, round_)


def _sampling(
    temperature: float, top_k: int, top_p: float, min_p: float, noise: int, seed: int, prompt_length: int
) -> Sampling:
    # A comparison with "not a number" is false, whichever way it is written.
    if not (0 <= temperature < math.inf and 0 <= top_p <= 1 and 0 <= min_p <= 1 and min(top_k, prompt_length) >= 0):
        raise WireError("sampling parameters out of range")
    if noise >= len(_NOISES):
        raise WireError(f"noise {noise} is none of {len(_NOISES)}")
    return Sampling(temperature, top_k, top_p, min_p, _NOISES[noise], seed, prompt_length)


def _integers(data: bytes, at: int, count: int) -> tuple[tuple[int, ...], int]:
    end = at + 4 * count
    if count < 0 or end > len(data):
        raise WireError(f"{count} integers announced, {(len(data) - at) // 4} there")
    values = array.array("i", data[at:end])
    if any(value < 0 for value in values):
        raise WireError("a negative token id")
    return tuple(values), end
