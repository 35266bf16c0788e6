"""All that the device knows of the requests: one row a slot, and one more for rows that have no request.

What the host sets, it sets in the order of the draft's stream. No tensor ever moves, so that CUDA graphs can hold them.

Shapes: S = slots + 1 (the last is nobody's: padding and rows without a table work there), N branches, K drafts, P
blocks a branch owns, W blocks a text has, M candidates, H hidden size, T tokens remembered of a text that is still
being read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_saguaro.algorithm.calibration import class_of
from vllm_saguaro.algorithm.sampling import SUPPORT
from vllm_saguaro.drafting.device_model import NULL_BLOCK, DeviceModel
from vllm_saguaro.messages import Sampling

TAIL = 256
"""T: rounds that the reading of a prompt may take. A request whose prompt takes longer goes without drafts."""


@dataclass(frozen=True, slots=True)
class SlotState:
    """One row a slot.

    The text: main [S, W] int32 and private [S, N, P] int32 are blocks; branches [S] int32, how many of the N have
    blocks; length [S] int32, tokens of the text; alive [S] bool, whether what is known of the text is right; ready [S]
    bool, whether the draft has its KV; admitted [S] int32, tokens when it was told; tail [S, T] int64, tokens since.

    How it samples: temperature, top_p, min_p [S] float32, top_k [S] int64, certain [S] bool, cls [S] int64 (of the
    acceptance maps); noisy [S] bool, whether the target's noise is known, by seed [S] int64; admission [S] int64 and
    rounds [S] int64 number the noise of what is drawn from q.

    The table of the round under way: accepted_keys [S, N] int32, bonus_keys [S, N] int64, drafts [S, N, K] int64,
    depth [S] int32; hidden [S, N, K, H], the state from which each draft was drawn; q_tokens [S, N, K, M] int32 and
    log_q [S, N, K, M] float32, what it was drawn from.

    What is under verification: under [S] int32, how many drafts; raw [S, K] float32, how likely each was to the draft.
    """

    main: Tensor
    private: Tensor
    branches: Tensor
    length: Tensor
    alive: Tensor
    ready: Tensor
    admitted: Tensor
    tail: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    top_k: Tensor
    certain: Tensor
    cls: Tensor
    noisy: Tensor
    seed: Tensor
    admission: Tensor
    rounds: Tensor
    accepted_keys: Tensor
    bonus_keys: Tensor
    drafts: Tensor
    depth: Tensor
    hidden: Tensor
    q_tokens: Tensor
    log_q: Tensor
    under: Tensor
    raw: Tensor

    @classmethod
    def empty(
        cls,
        model: DeviceModel,
        slots: int,
        branches: int,
        num_speculative_tokens: int,
        width: int,
        private_blocks: int,
        with_q: bool = True,
    ) -> SlotState:
        """No request in any slot. `with_q`: whether drafts are drawn from a q that somebody asks for."""
        device, rows, k = model.device, slots + 1, num_speculative_tokens
        m = min(SUPPORT, model.vocab_size) if with_q else 1

        def filled(*shape: int, value: float = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((rows, *shape), value, dtype=dtype, device=device)

        return cls(
            main=filled(width, value=NULL_BLOCK, dtype=torch.int32),
            private=filled(branches, private_blocks, value=NULL_BLOCK, dtype=torch.int32),
            branches=filled(dtype=torch.int32),
            length=filled(dtype=torch.int32),
            alive=filled(dtype=torch.bool),
            ready=filled(dtype=torch.bool),
            admitted=filled(dtype=torch.int32),
            tail=filled(TAIL),
            temperature=filled(value=1, dtype=torch.float32),
            top_p=filled(value=1, dtype=torch.float32),
            min_p=filled(dtype=torch.float32),
            top_k=filled(),
            certain=filled(value=1, dtype=torch.bool),
            cls=filled(),
            noisy=filled(dtype=torch.bool),
            seed=filled(),
            admission=filled(),
            rounds=filled(),
            accepted_keys=filled(branches, value=-1, dtype=torch.int32),
            bonus_keys=filled(branches),
            drafts=filled(branches, k),
            depth=filled(dtype=torch.int32),
            hidden=filled(branches, k, model.hidden_size, dtype=model.dtype),
            q_tokens=filled(branches, k, m, dtype=torch.int32),
            log_q=filled(branches, k, m, dtype=torch.float32),
            under=filled(dtype=torch.int32),
            raw=filled(k, dtype=torch.float32),
        )

    @property
    def nobody(self) -> int:
        """The row that is no slot."""
        return self.main.shape[0] - 1

    @property
    def resident_bytes(self) -> int:
        """What the tensors take on the device."""
        return sum(getattr(self, field.name).nbytes for field in dataclasses.fields(self))

    def admit(self, slot: int, length: int, sampling: Sampling, certain: bool, admission: int) -> None:
        """A request of `length` tokens is in the slot; its KV is not there yet, nor are its blocks known."""
        greedy = sampling.greedy
        plain = Sampling(temperature=1.0) if greedy else sampling  # a greedy q only predicts
        for tensor, value in (
            (self.length, length),
            (self.admitted, length),
            (self.alive, True),
            (self.ready, False),
            (self.temperature, plain.temperature),
            (self.top_p, plain.top_p),
            (self.min_p, plain.min_p),
            (self.top_k, plain.top_k),
            (self.certain, certain),
            (self.cls, class_of(sampling.temperature, coupled=sampling.coupled, certain=certain, backup=False)),
            (self.noisy, sampling.coupled),
            (self.seed, sampling.seed),
            (self.admission, admission),
            (self.rounds, 0),
            (self.depth, 0),
            (self.under, 0),
        ):
            tensor[slot].fill_(value)
        self.accepted_keys[slot].fill_(-1)

    def give_blocks(self, slot: int, main: Sequence[int], private: Sequence[int]) -> None:
        """The blocks of a slot, all of them: of its text, and of its branches one after the other."""
        count = len(private) // self.private.shape[2]
        self.main[slot].fill_(NULL_BLOCK)
        self.private[slot].fill_(NULL_BLOCK)
        self.main[slot, : len(main)].copy_(self._sent(main, torch.int32), non_blocking=True)
        own = self._sent(private, torch.int32).view(count, -1)
        self.private[slot, :count].copy_(own, non_blocking=True)
        self.branches[slot].fill_(count)

    def more_blocks(self, places: Sequence[tuple[int, int, int]]) -> None:
        """More blocks for some texts: (slot, entry of its table, block), each entry once."""
        slots, entries, blocks = self._sent(places, torch.int64).unbind(1)
        self.main[slots, entries] = blocks.to(torch.int32)

    def forget(self, slot: int) -> None:
        """Nobody is in the slot: whatever is found there is no hit, and no round is begun."""
        for tensor in (self.alive, self.ready, self.depth, self.under, self.branches):
            tensor[slot].fill_(0)
        self.main[slot].fill_(NULL_BLOCK)
        self.private[slot].fill_(NULL_BLOCK)

    def _sent(self, values: Sequence[int] | Sequence[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
        """Values of the host on the device. From pinned memory, which torch keeps until the copy is done: no wait."""
        device = self.main.device
        on_host = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
        return on_host.to(device, non_blocking=True)
