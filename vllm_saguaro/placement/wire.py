"""`Step` as bytes: a fixed little-endian layout with magic, version and lengths, and a decoder that trusts nothing.

No pickle crosses between the two sides: any bytes decode to a `Step` or raise `WireError`.
"""

from __future__ import annotations

import array
import struct
import sys

from vllm_saguaro.messages import Admit, Outcome, Release, Stamp, Step

_MAGIC = 0x53474152  # "SGAR"
_VERSION = 1
_HEADER = struct.Struct("<IHHHH")  # magic, version, admits, outcomes, releases
_STAMP = struct.Struct("<iiq")  # slot, generation, round
_ADMIT = struct.Struct("<iiqfi")  # stamp, temperature, number of tokens
_OUTCOME = struct.Struct("<iiqiiii")  # stamp, accepted, bonus, length, number of drafts

if sys.byteorder != "little" or array.array("i").itemsize != 4:  # pragma: no cover
    raise ImportError("vllm_saguaro needs a little-endian machine with 32-bit C integers")


class WireError(ValueError):
    """Bytes that are not a `Step`."""


def encode(step: Step) -> bytes:
    """The bytes of a step. Raises `struct.error` for values beyond 32 bits (64 for the round)."""
    parts = [_HEADER.pack(_MAGIC, _VERSION, len(step.admits), len(step.outcomes), len(step.releases))]
    for admit in step.admits:
        stamp = admit.stamp
        parts.append(_ADMIT.pack(stamp.slot, stamp.generation, stamp.round, admit.temperature, len(admit.token_ids)))
        parts.append(array.array("i", admit.token_ids).tobytes())
    for o in step.outcomes:
        stamp, drafts = o.stamp, o.speculation
        parts.append(
            _OUTCOME.pack(stamp.slot, stamp.generation, stamp.round, o.accepted, o.bonus, o.length, len(drafts))
        )
        parts.append(array.array("i", drafts).tobytes())
    for release in step.releases:
        stamp = release.stamp
        parts.append(_STAMP.pack(stamp.slot, stamp.generation, stamp.round))
    return b"".join(parts)


def decode(data: bytes) -> Step:
    """The step in `data`. Raises `WireError` for anything that `encode` did not make."""
    try:
        magic, version, admits, outcomes, releases = _HEADER.unpack_from(data)
        if (magic, version) != (_MAGIC, _VERSION):
            raise WireError(f"magic {magic:#x}, version {version}: not a step of version {_VERSION}")
        at = _HEADER.size
        step = Step()
        for _ in range(admits):
            slot, generation, round_, temperature, count = _ADMIT.unpack_from(data, at)
            tokens, at = _integers(data, at + _ADMIT.size, count)
            step.admits.append(Admit(_stamp(slot, generation, round_), temperature, tokens))
        for _ in range(outcomes):
            slot, generation, round_, accepted, bonus, length, count = _OUTCOME.unpack_from(data, at)
            drafts, at = _integers(data, at + _OUTCOME.size, count)
            if accepted < 0 or bonus < 0 or length < 0:
                raise WireError("an outcome with a negative count")
            step.outcomes.append(Outcome(_stamp(slot, generation, round_), accepted, bonus, length, drafts))
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


def _integers(data: bytes, at: int, count: int) -> tuple[tuple[int, ...], int]:
    end = at + 4 * count
    if count < 0 or end > len(data):
        raise WireError(f"{count} integers announced, {(len(data) - at) // 4} there")
    values = array.array("i", data[at:end])
    if any(value < 0 for value in values):
        raise WireError("a negative token id")
    return tuple(values), end
