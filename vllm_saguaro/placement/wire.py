"""`Step` as bytes: a fixed little-endian layout with magic, version and lengths, and a decoder that trusts nothing.

No pickle crosses between the two sides: any bytes decode to a `Step` within the `Limits` or raise `WireError`. The
layout is canonical: what decodes is what `encode` makes of the step, byte for byte.

    header    magic, version (16 bits), numbers of admits, wants, outcomes, releases (16 bits each)
    admits    stamp, sampling, number of tokens; the tokens (32 bits each)
    wants     stamp, accepted, bonus, depth
    outcomes  stamp, accepted, bonus, length, verified, number of drafts; the drafts (32 bits each)
    releases  stamp
"""

from __future__ import annotations

import array
import math
import struct
import sys
from dataclasses import dataclass
from typing import Final

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


_LARGEST = 2**31 - 1


class WireError(ValueError):
    """Bytes that are not a `Step`."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step may say to a draft side: slots below `slots`, at most K drafts, and so many bytes for all of it.

    Token ids are only known not to be negative: the draft side knows which of them it knows (`DraftLoop`).
    """

    slots: int = _LARGEST + 1
    num_speculative_tokens: int = _LARGEST
    frame_bytes: int = 1 << 28


_NO_LIMITS = Limits()


UNENCODABLE: Final = (struct.error, OverflowError)
"""What `encode` raises for a step that no frame can hold."""


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


def decode(data: bytes, limits: Limits = _NO_LIMITS) -> Step:
    """The step in `data`. Raises `WireError` for anything that `encode` did not make, or that is beyond the limits."""
    if len(data) > limits.frame_bytes:
        raise WireError(f"{len(data)} bytes, {limits.frame_bytes} at most")
    try:
        magic, version, admits, wants, outcomes, releases = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, _VERSION):
            raise WireError(f"magic {magic:#x}, version {version}: not a step of version {_VERSION}")
        at = _HEADER.size
        least = at + admits * _ADMIT.size + wants * _WANT.size + outcomes * _OUTCOME.size + releases * _STAMP.size
        if least > len(data):
            raise WireError(f"{least} bytes announced at least, {len(data)} there")
        step, most, slots = Step(), limits.num_speculative_tokens, limits.slots
        for _ in range(admits):
            slot, generation, round_, *asked, count = _ADMIT.unpack_from(data, at)
            tokens, at = _integers(data, at + _ADMIT.size, count)
            step.admits.append(Admit(_stamp(slot, generation, round_, slots), _sampling(*asked), tokens))
        for _ in range(wants):
            slot, generation, round_, accepted, bonus, depth = _WANT.unpack_from(data, at)
            at += _WANT.size
            if not (0 <= accepted <= most and bonus >= 0 and 0 <= depth <= most):
                raise WireError("a want out of range")
            step.wants.append(Want(_stamp(slot, generation, round_, slots), accepted, bonus, depth))
        for _ in range(outcomes):
            slot, generation, round_, accepted, bonus, length, verified, count = _OUTCOME.unpack_from(data, at)
            if not (0 <= accepted <= verified <= most and bonus >= 0 and length >= 0 and count <= most):
                raise WireError("an outcome out of range")
            drafts, at = _integers(data, at + _OUTCOME.size, count)
            stamp = _stamp(slot, generation, round_, slots)
            step.outcomes.append(Outcome(stamp, accepted, bonus, length, drafts, verified))
        for _ in range(releases):
            slot, generation, round_ = _STAMP.unpack_from(data, at)
            at += _STAMP.size
            step.releases.append(Release(_stamp(slot, generation, round_, slots)))
    except struct.error as error:
        raise WireError(str(error)) from None
    if at != len(data):
        raise WireError(f"{len(data) - at} bytes too many")
    return step


def _stamp(slot: int, generation: int, round_: int, slots: int) -> Stamp:
    if not 0 <= slot < slots:
        raise WireError(f"slot {slot} of {slots}")
    if generation < 0 or round_ < 0:
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
    if values and min(values) < 0:
        raise WireError("a negative token id")
    return tuple(values), end
