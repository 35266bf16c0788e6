"""Who may join a draft pool: engines that agree on what they want drafted, as many as there is room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_saguaro.drafting.kv import blocks_for
from vllm_saguaro.placement.channel import NotAdmitted

_OWN_OF_THE_MODEL = (
    *("max_rows", "kv_cache_bytes", "max_length", "max_tokens", "seed", "enforce_eager", "compilation_mode"),
)
"""What an engine says of the draft model that the pool has from the first one: sizes, and what no token depends on."""
_AGREED = ("num_speculative_tokens", "draft_sample_method")


@dataclass(frozen=True, slots=True)
class Ask:
    """What an engine asks a pool for. `options`: those of `load_engine`; `slots`: requests that it may have there."""

    engine: str
    """Which engine, for the log."""
    options: Mapping[str, Any]
    slots: int

    @property
    def agreed(self) -> dict[str, Any]:
        """What all engines of a pool must have alike, by the name that a user knows."""
        model = {f"draft {k}": v for k, v in self.options["model"].items() if k not in _OWN_OF_THE_MODEL}
        return model | {name: self.options[name] for name in _AGREED}


@dataclass(frozen=True, slots=True)
class Room:
    """What a pool has: links, rows of a forward, and KV blocks, each of so many tokens."""

    engines: int
    rows: int
    blocks: int
    block_size: int
    max_length: int
    """Longest text, in tokens, that the draft can hold."""


def check_agreement(ask: Ask, first: Ask) -> None:
    """Raises `NotAdmitted` where the settings are not those of the engine that started the pool."""
    ours, theirs = ask.agreed, first.agreed
    names = sorted(ours.keys() | theirs.keys())
    differing = [f"{n} {ours.get(n)!r} instead of {theirs.get(n)!r}" for n in names if ours.get(n) != theirs.get(n)]
    if differing:
        raise NotAdmitted(
            f"its settings are not those of the pool: {', '.join(differing)}. Write the same, or another draft_pool",
            disagrees=True,
        )


def check_room(ask: Ask, others: Sequence[Ask], room: Room) -> None:
    """Raises `NotAdmitted` where there is no room beside the `others`.

    Each engine has to have a row a request; and an equal part of the blocks must hold the longest text of any of them,
    with its branches.
    """
    if len(others) >= room.engines:
        raise NotAdmitted(
            f"the pool has room for {room.engines} engines (draft_pool_engines), which are all there", False
        )
    rows = room.rows - sum(other.slots for other in others)
    if ask.slots > rows:
        raise NotAdmitted(
            f"it may have {ask.slots} requests (twice its max_num_seqs), and the pool has rows for {rows} more"
        )
    part, need = room.blocks // (len(others) + 1), max(_blocks(one, room) for one in (ask, *others))
    if others and need > part:
        raise NotAdmitted(
            f"of the pool's {room.blocks} KV blocks each of {len(others) + 1} engines would have {part}, and the "
            f"longest text with its branches takes {need}"
        )


def _blocks(ask: Ask, room: Room) -> int:
    """KV blocks of one text as long as this engine's may be, and of as many branches as it may have."""
    steps, length = ask.options["num_speculative_tokens"], min(ask.options["model"]["max_length"], room.max_length)
    a_branch = blocks_for(steps, room.block_size) + 1  # it may begin anywhere in a block
    return blocks_for(length, room.block_size) + int(ask.options["branches"]) * a_branch
