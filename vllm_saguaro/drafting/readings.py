"""Texts that the draft has yet to read: pieces of prompts, in between the rounds of others.

The tokens that a request gets while its prompt is still being read are known on the device alone (`SlotState.tail`),
and the host does not know how many there are, only how many there may be: one for each step that it was in. The last
piece of a text holds that many, and writes the KV of those that exist.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_saguaro.drafting.device_model import NO_PLACE, DeviceModel, Piece
from vllm_saguaro.drafting.slot_state import SlotState

PROMPT_PIECE = 512
"""Tokens read in one step while others draft: the next table waits for them."""


@dataclass(slots=True)
class Reading:
    """A text: its tokens as they were told, how many of them have KV, and how many may have come since.

    `most`: more than that would not be read; the device gives the request up if it has them.
    """

    slot: int
    token_ids: Sequence[int]
    most: int
    done: int = 0
    since: int = 0

    @property
    def rest(self) -> int:
        """Tokens still to be read, with those that may have come since."""
        return len(self.token_ids) - self.done + self.since


class Readings:
    """Reads the texts one after the other, as many tokens a step as the others can wait for."""

    def __init__(self, model: DeviceModel, state: SlotState) -> None:
        self._model, self._state = model, state
        self._waiting: deque[Reading] = deque()
        self._left = model.max_tokens

    def __contains__(self, slot: object) -> bool:
        return any(reading.slot == slot for reading in self._waiting)

    def add(self, slot: int, token_ids: Sequence[int]) -> None:
        """A text whose blocks the slot has."""
        most = min(self._state.tail.shape[1], self._model.max_tokens, self._model.max_length - len(token_ids))
        self._waiting.append(Reading(slot, token_ids, most))

    def drop(self, slot: int) -> None:
        """The text need not be read any more."""
        self._waiting = deque(reading for reading in self._waiting if reading.slot != slot)

    def next_step(self, slots: Iterable[int], others: bool) -> None:
        """A step of the target had these slots in it. `others`: whether any request is drafted for meanwhile."""
        among = set(slots)
        for reading in self._waiting:
            reading.since = min(reading.since + (reading.slot in among), reading.most)
        self._left = min(PROMPT_PIECE, self._model.max_tokens) if others else self._model.max_tokens

    def read_on(self) -> list[int]:
        """Read as much as this step has room for; the slots whose text is read to its end now."""
        finished = []
        while self._waiting and self._left > 0:
            reading = self._waiting[0]
            if reading.rest <= self._left:
                self._left -= reading.rest
                self._finish(reading)
                finished.append(self._waiting.popleft().slot)
            else:
                known = min(self._left, len(reading.token_ids) - reading.done)
                if known == 0:  # only what came since is left, and it comes in one piece
                    break
                self._left -= known
                self._model.read(self._piece(reading, self._told(reading, known)))
                reading.done += known
        return finished

    def _finish(self, reading: Reading) -> None:
        state, slot = self._state, reading.slot
        told = self._told(reading, len(reading.token_ids) - reading.done)
        if reading.rest:
            tail = state.tail[slot, : reading.since].clamp(0, self._model.vocab_size - 1)
            self._model.read(self._piece(reading, torch.cat((told, tail))))
        state.ready[slot].copy_(state.alive[slot])

    def _told(self, reading: Reading, count: int) -> Tensor:
        tokens = reading.token_ids[reading.done : reading.done + count]
        device = self._model.device
        on_host = torch.tensor(tokens, dtype=torch.int64, pin_memory=device.type == "cuda")
        return on_host.to(device, non_blocking=True)

    def _piece(self, reading: Reading, token_ids: Tensor) -> Piece:
        """The next tokens of a text, each with its place; those past its end, as the device knows it, have none."""
        state, size = self._state, self._model.block_size
        table = state.main[reading.slot]
        position = torch.arange(reading.done, reading.done + token_ids.shape[0], device=table.device)
        entry = torch.div(position, size, rounding_mode="floor").clamp_max(table.shape[0] - 1)
        place = table[entry].long() * size + position % size
        exists = position < state.length[reading.slot]
        return Piece(token_ids, reading.done, table, torch.where(exists, place, NO_PLACE))
