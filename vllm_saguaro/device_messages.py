"""The contract under vLLM's Model Runner V2, where the outcome of a verification never reaches the host.

`messages.py` says what crosses between two sides that know the tokens. Here only the device knows them: the outcomes of
a step are tensors, the lookup and the gathering of drafts are tensor operations, and what comes back is K valid token
ids for every row with the number of them that are real. What the host does know (which request holds which slot, its
prompt, how it samples) is told as `admit` and `release`. A slot is the runner's own request slot.

B rows of the step, K drafts a round, R slots, V tokens of the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from vllm_saguaro.messages import Sampling


@dataclass(slots=True)
class DeviceOutcomes:
    """What one step of the target found. All tensors are on the device, in batch order, one entry a row; B >= 1.

    slots [B] int64: the runner's request slots, all different; `slots_on_host` [B] int64 is the same on the host.
    accepted [B] int32: k, how many drafts were accepted; -1 where the step gave the row no token (a prompt that is not
    yet read to its end): such a row has no outcome, and its other entries say nothing.
    verified [B] int32: how many drafts were in the pass, filler among them: K, or as few as the scheduler left; a row
    that accepted all of those was not judged beyond them. Never less than `accepted`.
    bonus [B] int64: t*, the token after the accepted ones.
    lengths [B] int32: how many tokens the request has, with the bonus token.
    temperature [B] float32: of the request; 0 is greedy.
    request_ids: the requests, by row.
    """

    slots: Tensor
    accepted: Tensor
    verified: Tensor
    bonus: Tensor
    lengths: Tensor
    temperature: Tensor
    request_ids: Sequence[str]
    slots_on_host: np.ndarray


@dataclass(slots=True)
class DeviceDrafts:
    """What every row of a step has to verify next.

    tokens [B, K] int64: every entry is a valid token id (the filler is the bonus token).
    ready [B] int32: how many leading drafts are real, 0 to K; the others are filler, to be marked invalid.

    Buffers, good until the next `exchange`; the caller may overwrite the tokens.
    """

    tokens: Tensor
    ready: Tensor


class DeviceDraft(Protocol):
    """Where drafts come from under runner V2: a stream of the same device, or a process beside.

    All calls come from the runner's thread, with its stream current. None of them waits for the device.
    """

    resident_bytes: int
    """Device memory held for good: the draft's weights, its KV, its tables and buffers."""

    @property
    def sampling_c(self) -> float | None:
        """C of Saguaro sampling for the rows that are sampled; None: there is none, or it is not known."""
        ...

    @property
    def branches(self) -> int | None:
        """Branches of a request in the newest round; None: not known on this side."""
        ...

    def admit(self, slot: int, request_id: str, token_ids: Sequence[int], sampling: Sampling) -> None:
        """A request, new or resumed, holds this slot from now on, with these tokens; replaces what the slot held."""
        ...

    def release(self, slot: int, request_id: str) -> None:
        """The request has left the slot: finished, aborted, preempted, or beyond what the draft can hold."""
        ...

    def exchange(self, outcomes: DeviceOutcomes) -> DeviceDrafts:
        """Look the outcomes up, gather the drafts, tell the draft side. Enqueues only: nothing is read on the host."""
        ...

    def logits_into(self, outcomes: DeviceOutcomes, drafts: DeviceDrafts, draft_logits: Tensor | None) -> None:
        """Write q of the drafts just given into `draft_logits` [R, K, V] float32 (None: nobody asks for it).

        The row of a slot becomes T * log q on the candidates that the tokens were drawn from and -inf elsewhere; a
        certain token is 0 at the token and -inf elsewhere. Rows of slots that are not in `outcomes` are left alone:
        their drafts may yet be under verification.
        """
        ...

    def capture(self) -> None:
        """Capture CUDA graphs, after the target's; nothing on the CPU."""
        ...

    def close(self) -> None:
        """Let go of everything; nothing else is called afterwards."""
        ...
